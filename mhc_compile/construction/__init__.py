"""Hyper-connections from construction on: planned classes, and models compiled in place."""
