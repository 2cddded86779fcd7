"""Attach hyper-connections to a user's model and add their parameters to existing optimizers."""
