"""`mhc plan TARGET` and `mhc plan SCRIPT ARGUMENTS`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mhc_compile.cli.option_flags import given_options
from mhc_compile.cli.run import script_flags, script_options

if TYPE_CHECKING:
    from mhc_compile.attachment.plan import Plan


@click.command("plan", context_settings={"allow_interspersed_args": False})
@script_flags
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A setting of a model TARGET. Repeatable.")
@click.option("-o", "--output", default="mhc.json", show_default=True, metavar="FILE", help="The plan.")
def command(
    module: bool,
    quiet: bool,
    script: str,
    arguments: tuple[str, ...],
    settings: tuple[str, ...],
    output: str,
    **flags: Any,
) -> None:
    """Write where the hyper-connections of a model belong, for mhc run --plan and attach.

    \b
    mhc plan train.py --lr 3e-4            (a script)
    mhc plan -o gpt.json -m package.train
    mhc plan hf:llama                      (a model, as for mhc explain)
    mhc plan path/to/file.py:factory

    A script runs until its models have been called once: the process ends before the first
    backward, optimizer step or second call. What it writes before that is written.

    A plan keeps the options that determine parameters, such as --streams. mhc_compile.attach(model,
    plan="mhc.json") and @mhc_compile.planned("mhc.json") use it in code.

    Exit codes: 0 written, 1 nothing to plan, 2 wrong usage.
    """  # noqa: D301 - click's mark for lines that are not wrapped
    more = {name: flags.pop(name) for name in ("compile", "replace_inductor")}
    file = Path(output).resolve()
    if module or (os.path.isfile(script) and not script.endswith(".pt2")):
        from mhc_compile.tools.launcher.command import launch

        options, _ = script_options(script, flags, module=module)
        launch(script, arguments, module=module, options=options, plan_output=str(file), quiet=quiet, **more)
    if arguments or not (":" in script or script.endswith(".pt2")):
        raise click.UsageError(
            f"there is no file {script!r} (looked in {os.getcwd()}), and it is no model like hf:llama or"
            " path/to/file.py:factory, which takes no arguments"
        )
    plan = _plan_target(script, settings, given_options(flags))
    plan.save(file)
    if not quiet:
        for model in plan.models:
            click.echo(f"mhc plan: {output}: {model.kind} ({len(model.connections)} hyper-connections)", err=True)


def _plan_target(target: str, settings: tuple[str, ...], options: dict[str, Any]) -> Plan:
    from torch import nn

    from mhc_compile.cli.targets import load_target, parse_settings
    from mhc_compile.compilation.attach import plan

    loaded = load_target(target, parse_settings(settings))
    if not isinstance(loaded.model, nn.Module):
        raise click.UsageError(f"{target!r} is an exported program: it has no constructor to plan for")
    return plan(loaded.model, *loaded.args, options=options, **loaded.kwargs)
