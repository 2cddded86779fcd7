"""The passes that rewrite graphs."""
