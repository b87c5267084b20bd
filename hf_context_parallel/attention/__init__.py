"""The strategies that execute a plan: they move ranges of keys and call a kernel on tiles."""
