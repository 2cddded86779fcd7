"""`mhc stability TARGET`: gains of H_res and its products over depth, geometry of streams."""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from mhc_compile.cli.shared import ModelCall, model_command
from mhc_compile.errors import MhcError


@model_command("stability", runs_model=True)
@click.option(
    "--random-logits",
    type=click.FloatRange(0, min_open=True),
    metavar="STD",
    help="Fill the static logits of every H_res with N(0, STD) noise first, to see what the mapping makes of them."
    " No file is changed.",
)
@click.option(
    "--png",
    "png_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write heat maps of H_res and of its products, and curves over depth. Needs matplotlib.",
)
def command(call: ModelCall, *, random_logits: float | None, png_file: Path | None) -> None:
    """Run TARGET once with hyper-connections and measure them over depth.

    For every site: the largest absolute row sum (what a signal can grow by) and column sum (what a
    gradient can grow by) of its H_res and of the products of H_res, the distance of H_res from
    doubly stochastic, and how far the streams differ. Hyper-connections that are not in --weights
    are initialized as by backend="mhc": H_res near the identity, and streams that are copies.

    Exit codes: 0 measured, 1 nothing is rewritten, 2 wrong usage.
    """
    if png_file is not None:
        from mhc_compile.inspection.stream_stats.plots import require_matplotlib

        try:
            require_matplotlib()
        except MhcError as error:
            raise click.UsageError(f"--png: {error}") from None
        if not png_file.absolute().parent.is_dir():
            raise click.UsageError(f"--png: there is no directory {png_file.absolute().parent}")
    import torch
    from torch import nn

    from mhc_compile.compilation.attach import attach
    from mhc_compile.inspection.stream_stats.measure import Meter, fill_residual_logits
    from mhc_compile.inspection.stream_stats.results import Stability

    loaded = call.loaded
    torch.manual_seed(call.seed or 0)
    model = loaded.model
    if not isinstance(model, nn.Module):
        raise click.UsageError(
            "an exported program has its hyper-connections as plain operations, which cannot be told apart: give the"
            " model that it was exported from"
        )
    with call.progress("measuring"):
        if not attach(model, *loaded.args, options=call.options, **loaded.kwargs):
            result = Stability(type(model).__name__, "train" if model.training else "eval", "", (), ())
        elif random_logits is not None and not fill_residual_logits(model, random_logits):
            raise click.UsageError("--random-logits: the mapping 'identity' has no logits; choose another --mapping")
        else:
            with contextlib.closing(Meter(model, options=call.options)) as meter:
                result = meter.measure(loaded.args, loaded.kwargs)
    if png_file is not None and result.chains:
        result.plot(png_file)
    call.show(result)
    if not result.chains:
        raise click.exceptions.Exit(1)
    if png_file is not None and not call.as_json:
        click.echo(f"wrote {png_file}", err=True)
