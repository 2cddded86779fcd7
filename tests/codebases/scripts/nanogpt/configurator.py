"""Run by `train.py` and `sample.py` in their own namespace: files and --key=value set globals."""

import sys
from ast import literal_eval

for argument in sys.argv[1:]:
    if not argument.startswith("--"):
        exec(open(argument).read())
        continue
    key, _, text = argument[2:].partition("=")
    if key not in globals():
        raise ValueError(f"unknown key {key}")
    try:
        globals()[key] = literal_eval(text)
    except (SyntaxError, ValueError):
        globals()[key] = text
