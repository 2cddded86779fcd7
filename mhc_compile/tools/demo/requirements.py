"""The optional dependencies of the demo: one clear error where one is missing, and no chatter where it is not."""

from __future__ import annotations

from importlib.util import find_spec

from mhc_compile.errors import MhcError

__all__ = ["REQUIRED", "check_requirements", "hush"]

REQUIRED = ("transformers", "matplotlib", "plotext")


def check_requirements() -> None:
    """Looks whether the demo's libraries are installed, without importing them.

    Raises:
        MhcError: naming what is missing and the command that installs it.
    """
    missing = [name for name in REQUIRED if find_spec(name) is None]
    if missing:
        raise MhcError(f'the demo needs {", ".join(missing)}: pip install "mhc-compile[demo]"')


def hush() -> None:
    """Turns off what transformers says about itself, and its progress bars."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
