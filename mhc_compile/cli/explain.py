"""`mhc explain TARGET`: the dry run, for people and as JSON."""

from __future__ import annotations

from typing import Any

import click

from mhc_compile.cli.shared import Command, backend_options, open_target, print_json, progress, target_arguments, write

__all__ = ["command"]


@click.command("explain", cls=Command)
@target_arguments
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the report.")
@click.option("--all", "every", is_flag=True, help="List every addition that is left alone, not one per reason.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def command(
    target: str,
    settings: tuple[str, ...],
    full_size: bool,
    train: bool,
    as_json: bool,
    every: bool,
    quiet: bool,
    **flags: Any,
) -> None:
    """Show what backend="mhc" would rewrite in TARGET, what it would leave alone and why, and what it costs.

    Nothing of the model is run. Exit code 1 if nothing would be rewritten.
    """
    from mhc_compile.explanation import explain
    from mhc_compile.report import render

    options = backend_options(flags)
    loaded = open_target(target, settings, full_size=full_size, train=train)
    with progress(f"tracing {target}", quiet=quiet):
        explanation = explain(loaded.model, *loaded.args, options=options, **loaded.kwargs)
    if as_json:
        print_json(explanation.to_dict())
    else:
        write(render(explanation, every=every))
    if not explanation.sites:
        raise click.exceptions.Exit(1)
