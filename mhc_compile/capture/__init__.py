"""Trace a model with Dynamo and map its graphs back to modules and parameters. Read only."""
