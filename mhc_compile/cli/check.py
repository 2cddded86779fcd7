"""`mhc check TARGET`: the proof that the rewritten model computes what the plain one does, tensor by tensor."""

from __future__ import annotations

from typing import Any

import click

from mhc_compile.cli.shared import (
    Command,
    backend_options,
    open_target,
    print_json,
    progress,
    target_arguments,
    weights_given,
    write,
)

__all__ = ["command"]


@click.command("check", cls=Command)
@target_arguments
@click.option(
    "--dtype",
    type=click.Choice(["float64", "float32", "bfloat16", "float16"]),
    help="Cast the model and its inputs first.  [default: the model's]",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of dropout and all random numbers.")
@click.option(
    "--tolerance",
    type=click.FloatRange(0, min_open=True),
    help="Largest relative error, without excuses.  [default: float64 1e-10, float32 1e-5, bfloat16 1e-2, float16 2e-3]",
)
@click.option("--all", "every", is_flag=True, help="List every tensor, not only the worst.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the report.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def command(
    target: str,
    settings: tuple[str, ...],
    full_size: bool,
    train: bool,
    dtype: str | None,
    seed: int,
    tolerance: float | None,
    every: bool,
    as_json: bool,
    quiet: bool,
    **flags: Any,
) -> None:
    """Run TARGET plain and with backend="mhc", forward and backward, and compare outputs, buffers, written inputs and every gradient.

    Two proofs: at the start the rewritten model is the plain one; and with random parameters, far from the start ("live"), the compiled model
    equals the same graph run by another compiler, and every site takes part. Further calls must compile nothing.

    A tensor that deviates by more than --tolerance is excused if the plain model rounds as much: if against the plain model in a wider dtype the
    rewritten one errs at most 4 times as much.

    Exit codes: 0 the same, 1 something deviates, compiles again, takes no part, or nothing is rewritten; 2 wrong usage.
    """
    if full_size and weights_given() is None:
        raise click.UsageError(
            "--full-size models have no memory without --weights FILE, and check runs the model: leave it out, or --set sizes"
        )
    options = backend_options(flags)
    import torch

    from mhc_compile.inspection.verification.check import check
    from mhc_compile.reporting.base import render

    torch.manual_seed(seed)  # a factory may draw its weights and inputs
    loaded = open_target(target, settings, full_size=full_size, train=train)
    with progress(f"checking {target}", quiet=quiet):
        result = check(
            loaded.model, *loaded.args, options=options, dtype=dtype, seed=seed, tolerance=tolerance, **loaded.kwargs
        )
    if as_json:
        print_json(result.to_dict())
    else:
        write(render(result, every=every))
    if not result.ok:
        raise click.exceptions.Exit(1)
