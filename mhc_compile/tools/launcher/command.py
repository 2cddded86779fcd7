"""Replace this process by `python script.py arguments`."""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
from typing import TYPE_CHECKING, Any, NoReturn

from mhc_compile.errors import MhcError
from mhc_compile.tools.launcher.run_config import VARIABLE, RunConfig

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_SITE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "site")


def launch(
    script: str, arguments: Sequence[str], *, module: bool, options: Mapping[str, Any], quiet: bool = False, **more: Any
) -> NoReturn:
    """Run `python script arguments`, or `python -m script arguments`, with mhc as default backend.

    `more` are further fields of `RunConfig`. It never returns. The Python is this one, with the
    flags that it was started with (`python -u -W error -m mhc_compile run …`).

    Raises:
        MhcError: this Python ignores the environment, which carries the backend to the script.
        OptionError: a setting for Inductor cannot be passed on.
    """
    if sys.flags.ignore_environment or sys.flags.no_site:
        raise MhcError(
            "mhc run cannot set a default backend below python -I, -E or -S, which keep PYTHONPATH or sitecustomize out;"
            " leave these flags out"
        )
    config = RunConfig(
        script=f"-m {script}" if module else script,
        options=dict(options),
        quiet=quiet,
        **more,
        pid=os.getpid(),
        prefix=sys.prefix,
        reports=os.path.join(tempfile.gettempdir(), f"mhc-run-{os.getpid()}-{secrets.token_hex(8)}"),
    )
    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry != _SITE]
    environment = {**os.environ, VARIABLE: config.dump(), "PYTHONPATH": os.pathsep.join([_SITE, *filter(None, path)])}
    command = [sys.executable, *interpreter_flags(sys.orig_argv), *(["-m"] if module else []), script, *arguments]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, command, environment)  # noqa: S606 - no shell is wanted


def interpreter_flags(command: Sequence[str]) -> list[str]:
    """Return Python's own flags in `sys.orig_argv`: ["-u"] for `python -u -m mhc_compile run …`."""
    flags: list[str] = []
    rest = iter(command[1:])
    for word in rest:
        if not word.startswith("-") or word in {"-", "--"}:
            break
        if word.startswith("--"):  # --check-hash-based-pycs
            flags += [word, next(rest, "")]
            continue
        for position, letter in enumerate(word[1:], 1):
            if letter in "mc":
                return [*flags, word[:position]] if position > 1 else flags
            if letter in "WX":
                value = word[position + 1 :]
                flags += [word] if value else [word, next(rest, "")]
                break
        else:
            flags.append(word)
    return flags
