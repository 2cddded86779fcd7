"""`mhc run`: an unmodified script whose `torch.compile(model)` names no backend, with mhc as the default backend.

The script is run by a fresh `python script.py`, which takes the place of this process (`command.py`): exit code, signals, terminal, `__main__`,
`sys.argv`, `sys.path` and tracebacks are plain Python's because nothing else is there. That Python finds `site/sitecustomize.py` by `PYTHONPATH`;
so do the Pythons that it starts, torchrun's workers and spawned children among them. Once torch has been imported, the default backend is set
(`activation.py`) to a callable that knows the options (`default.py`). `tally.py` counts what it does, and `messages.py` says it.
"""
