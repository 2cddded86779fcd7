"""`mhc explain TARGET`: the additions that are rewritten, those that are skipped, and the cost."""

from __future__ import annotations

import click

from mhc_compile.cli.shared import ModelCall, model_command


@model_command("explain")
@click.option("--all", "every", is_flag=True, help="List every skipped addition, not one per reason.")
@click.option(
    "--why",
    "node",
    metavar="NAME",
    help="Explain single additions in full: the name of an operation, the path of a site or a module, or file.py:LINE.",
)
@click.option(
    "--lr",
    type=click.FloatRange(0, min_open=True),
    help="Peak learning rate of a training, with --steps: how far AdamW can move the gates in it.",
)
@click.option("--steps", type=click.IntRange(1), help="Optimizer steps of that training.")
def command(call: ModelCall, *, every: bool, node: str | None, lr: float | None, steps: int | None) -> None:
    """Show what backend="mhc" rewrites in TARGET, what it skips and why, and the cost.

    The model is traced, not run. Exit code 1 if nothing is rewritten; with --why always 0.
    """
    from mhc_compile.inspection.explain.explain import explain
    from mhc_compile.inspection.explain.why import why

    if (lr is None) != (steps is None):
        raise click.UsageError("--lr and --steps go together: how far the gates can move depends on their product")
    loaded = call.loaded
    if node is not None:
        with call.progress("tracing"):
            found = why(loaded.model, *loaded.args, node=node, options=call.options, **loaded.kwargs)
        call.show(found)
        return
    with call.progress("tracing"):
        explanation = explain(loaded.model, *loaded.args, options=call.options, **loaded.kwargs)
    if lr is not None and steps is not None:
        explanation = explanation.in_training(lr, steps)
    call.show(explanation, every=every)
    if not explanation.sites:
        raise click.exceptions.Exit(1)
