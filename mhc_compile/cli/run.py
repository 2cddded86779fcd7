"""`mhc run SCRIPT ARGUMENTS`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from mhc_compile.cli.option_flags import given_options, option_flags


@click.command("run", context_settings={"allow_interspersed_args": False})
@click.option("-m", "module", is_flag=True, help="SCRIPT is the name of a module, as for python -m.")
@option_flags
@click.option("--quiet", is_flag=True, help="Do not report what was rewritten.")
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(module: bool, quiet: bool, script: str, arguments: tuple[str, ...], **flags: Any) -> None:
    """Run an unmodified training script with mhc as the default backend of torch.compile.

    \b
    mhc run train.py --lr 3e-4
    mhc run --streams 2 --inductor max_autotune=True train.py
    mhc run -m package.train --lr 3e-4
    mhc run -m torch.distributed.run --nproc-per-node 2 train.py
    torchrun --nproc-per-node 2 -m mhc_compile run train.py

    Everything after SCRIPT is passed to it. It runs as `python SCRIPT ARGUMENTS` does, in its own
    process and with its own exit code; Pythons that it starts have the backend too. An explicit
    backend= is not changed, and options= without one are settings for Inductor.

    Options may also be in a table [tool.mhc] of a pyproject.toml, searched from the directory of
    the script upwards and then from the current one; flags override it.

    A line on stderr reports what was rewritten. Exit codes: those of the script; 2 wrong usage.
    """  # noqa: D301 - click's mark for lines that are not wrapped
    from mhc_compile.errors import OptionError
    from mhc_compile.tools.launcher.command import launch
    from mhc_compile.tools.launcher.run_config import find_options

    if not module and not os.path.exists(script):
        raise click.UsageError(f"there is no file {script!r} (looked in {os.getcwd()}); for a module: mhc run -m NAME")
    given = given_options(flags)
    try:
        table = find_options(*([] if module else [Path(script).resolve().parent]), Path.cwd())
    except OptionError as error:
        raise click.UsageError(str(error)) from error
    inductor = {**table.get("inductor", {}), **given.get("inductor", {})}
    options = {**table, **given, **({"inductor": inductor} if inductor else {})}
    launch(script, arguments, module=module, options=options, quiet=quiet)
