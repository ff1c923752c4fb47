"""The verbs: functions from trees to trees, by name, over the walker and the selection.

Every verb takes a parameter tree or any other pytree, and returns the same container. A file holds a
family, under the name of its verb.
"""
