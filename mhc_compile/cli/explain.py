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
@click.option(
    "--why",
    "node",
    metavar="NAME",
    help="The full story of one add: the name of an operation, the path of a site or a module, or file.py:LINE.",
)
@click.option("--quiet", is_flag=True, help="Show no progress.")
def command(
    target: str,
    settings: tuple[str, ...],
    full_size: bool,
    train: bool,
    as_json: bool,
    every: bool,
    node: str | None,
    quiet: bool,
    **flags: Any,
) -> None:
    """Show what backend="mhc" would rewrite in TARGET, what it would leave alone and why, and what it costs.

    Nothing of the model is run. Exit code 1 if nothing would be rewritten; with --why, 0 whatever the verdict.
    """
    from mhc_compile.inspection.explain.explain import explain
    from mhc_compile.inspection.explain.report import render

    options = backend_options(flags)
    loaded = open_target(target, settings, full_size=full_size, train=train)
    if node is not None:
        from mhc_compile.inspection.explain.why import why

        with progress(f"tracing {target}", quiet=quiet):
            story = why(loaded.model, *loaded.args, node=node, options=options, **loaded.kwargs)
        if as_json:
            print_json(story.to_dict())
        else:
            write(story)
        return
    with progress(f"tracing {target}", quiet=quiet):
        explanation = explain(loaded.model, *loaded.args, options=options, **loaded.kwargs)
    if as_json:
        print_json(explanation.to_dict())
    else:
        write(render(explanation, every=every))
    if not explanation.sites:
        raise click.exceptions.Exit(1)
