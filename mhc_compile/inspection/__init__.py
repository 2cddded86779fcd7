"""Inspect models and graphs and report; nothing here changes a model."""
