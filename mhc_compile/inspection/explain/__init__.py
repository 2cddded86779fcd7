"""Explain which residual adds are rewritten, and why the others are not."""
