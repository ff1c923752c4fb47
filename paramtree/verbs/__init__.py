"""The verbs: functions from trees to trees, by name, over the walker and the selection.

Most verbs take a parameter tree or any other pytree and return the same container; those that need the
structure of a parameter tree say so. Each file holds one family, and is named after a verb in it.
"""
