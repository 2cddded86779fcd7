"""Carry streams from one compiled graph to the next at run time."""
