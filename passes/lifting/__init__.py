"""Run trunk operations on every stream."""
