"""`mhc run SCRIPT ARGUMENTS`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mhc_compile.cli.option_flags import given_options, option_flags

if TYPE_CHECKING:
    from collections.abc import Callable


def script_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add SCRIPT, its arguments, and the flags of commands that run a script."""
    for option in (
        click.argument("arguments", nargs=-1, type=click.UNPROCESSED),
        click.argument("script"),
        click.option("--quiet", is_flag=True, help="Do not report what was rewritten."),
        option_flags,
        click.option("--replace-inductor", is_flag=True, help='Also replace backend="inductor" where code names it.'),
        click.option("--compile", is_flag=True, help="Compile the models of a script that calls no torch.compile."),
        click.option("-m", "module", is_flag=True, help="SCRIPT is the name of a module, as for python -m."),
    ):
        command = option(command)
    return command


@click.command("run", context_settings={"allow_interspersed_args": False})
@script_flags
@click.option("--plan", metavar="FILE", help="Construct models with the hyper-connections of this plan.")
def command(module: bool, quiet: bool, script: str, arguments: tuple[str, ...], plan: str | None, **flags: Any) -> None:
    """Run an unmodified training script with mhc as the default backend of torch.compile.

    \b
    mhc run train.py --lr 3e-4
    mhc run --plan mhc.json train.py --lr 3e-4
    mhc run --streams 2 --inductor max_autotune=True train.py
    mhc run -m package.train --lr 3e-4
    mhc run -m torch.distributed.run --nproc-per-node 2 train.py
    torchrun --nproc-per-node 2 -m mhc_compile run train.py

    Everything after SCRIPT is passed to it. It runs as `python SCRIPT ARGUMENTS` does, in its own
    process and with its own exit code; Pythons that it starts have the backend too. An explicit
    backend= is not changed, and options= without one are settings for Inductor.

    With --plan, models have their hyper-connections when they are constructed, and use them
    wherever they are called; a missing FILE is made first, as by mhc plan. Without it they come
    with the checkpoint that the script loads, or at the first compiled call.

    Options, and plan, may also be in a table [tool.mhc] of a pyproject.toml, searched from the
    directory of the script upwards and then from the current one; flags override it.

    Lines on stderr report what was rewritten, trained and saved. Exit codes: those of the script; 2
    wrong usage.
    """  # noqa: D301 - click's mark for lines that are not wrapped
    from mhc_compile.errors import OptionError
    from mhc_compile.tools.launcher.command import launch
    from mhc_compile.tools.launcher.run_config import read_plan

    more = {name: flags.pop(name) for name in ("compile", "replace_inductor")}
    options, planned = script_options(script, flags, module=module)
    plan = plan or planned
    file = Path(plan).resolve() if plan else None
    if file is not None:
        if not file.exists():
            _make_plan(file)
        try:
            options = read_plan(file, options)
        except OptionError as error:
            raise click.UsageError(str(error)) from error
    launch(script, arguments, module=module, options=options, quiet=quiet, plan=file and str(file), **more)


def script_options(script: str, flags: dict[str, Any], *, module: bool) -> tuple[dict[str, Any], str | None]:
    """Return the options for a script, from flags and [tool.mhc], and the plan in that table."""
    from mhc_compile.errors import OptionError
    from mhc_compile.tools.launcher.run_config import find_options

    if not module and not os.path.exists(script):
        raise click.UsageError(f"there is no file {script!r} (looked in {os.getcwd()}); for a module: mhc run -m NAME")
    given = given_options(flags)
    try:
        table = find_options(*([] if module else [Path(script).resolve().parent]), Path.cwd())
    except OptionError as error:
        raise click.UsageError(str(error)) from error
    plan = table.pop("plan", None)
    inductor = {**table.get("inductor", {}), **given.get("inductor", {})}
    return {**table, **given, **({"inductor": inductor} if inductor else {})}, plan


def _make_plan(file: Path) -> None:
    """Run `mhc plan -o FILE` with the flags, the script and the arguments of this command."""
    from mhc_compile.tools.launcher.command import interpreter_flags

    if "RANK" in os.environ:
        raise click.UsageError(f"there is no plan {str(file)!r}. Make it before the processes start, with mhc plan")
    words = _without_plan(sys.argv[sys.argv.index("run") + 1 :])
    command = [sys.executable, *interpreter_flags(sys.orig_argv), "-m", "mhc_compile", "plan", "-o", str(file), *words]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)  # noqa: S603 - the user's command
    if done.returncode != 0 or not file.exists():
        raise click.ClickException(f"the script ended with {done.returncode} before there was a plan {str(file)!r}")


def _without_plan(words: list[str]) -> list[str]:
    for position, word in enumerate(words):
        if word == "--plan":
            return words[:position] + words[position + 2 :]
        if word.startswith("--plan="):
            return words[:position] + words[position + 1 :]
    return words
