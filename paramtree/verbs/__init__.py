"""The verbs: functions from trees to trees, a file a family."""
