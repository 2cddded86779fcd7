"""`mhc run`: run an unmodified script with mhc as the default backend of `torch.compile`.

command.py               replaces this process by a fresh `python script.py`
run_config.py            the configuration, and the environment variable that carries it
site/sitecustomize.py    waits for torch in that Python, and in every Python that it starts
activation.py            sets the default backend once torch is imported
report_counter.py        counts rewritten models, also those of children, and reports them

Exit code, signals, terminal, `__main__`, `sys.argv`, `sys.path` and tracebacks are plain Python's,
because the script's process runs nothing else. `site/` is on `PYTHONPATH`, so torchrun's workers
and spawned children have the backend too.
"""
