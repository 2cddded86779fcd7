"""`mhc check TARGET`: compare the rewritten model with the plain one, tensor by tensor."""

from __future__ import annotations

import click

from mhc_compile.cli.shared import ModelCall, model_command


@model_command("check", runs_model=True)
@click.option(
    "--dtype",
    type=click.Choice(["float64", "float32", "bfloat16", "float16"]),
    help="Cast the model and its inputs first.  [default: the model's]",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0, min_open=True),
    help="Largest relative error, without excuses."
    "  [default: float64 1e-10, float32 1e-5, bfloat16 1e-2, float16 2e-3]",
)
@click.option("--all", "every", is_flag=True, help="List every tensor, not only the worst.")
def command(call: ModelCall, *, dtype: str | None, tolerance: float | None, every: bool) -> None:
    """Run TARGET plain and with backend="mhc", forward and backward, and compare every tensor.

    Two comparisons of outputs, buffers, written inputs and gradients: initially the rewritten model
    equals the plain one; with random parameters of the hyper-connections ("live") the compiled
    model equals the same graph run by another compiler, and every site takes part. Further calls
    must compile nothing.

    A tensor that deviates by more than --tolerance is excused if the plain model rounds as much:
    compared with the plain model in a wider dtype, the rewritten one errs at most 4 times as much.

    Exit codes: 0 the same, 1 something deviates, compiles again, takes no part, or nothing is
    rewritten; 2 wrong usage.
    """
    from mhc_compile.inspection.verification.check import check

    loaded, options, seed = call.loaded, call.options, call.seed or 0
    with call.progress("checking"):
        result = check(
            loaded.model, *loaded.args, options=options, dtype=dtype, seed=seed, tolerance=tolerance, **loaded.kwargs
        )
    call.show(result, every=every)
    if not result.ok:
        raise click.exceptions.Exit(1)
