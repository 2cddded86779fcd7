"""`mhc stability TARGET`: the gains of H_res and of its products over depth, and what the streams are like."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from mhc_compile.cli.targets import Target
    from mhc_compile.inspection.stream_stats.results import Stability

__all__ = ["command"]


@click.command("stability", cls=Command)
@target_arguments
@click.option(
    "--random-logits",
    type=click.FloatRange(0, min_open=True),
    metavar="STD",
    help="Fill the static logits of every H_res with N(0, STD) noise first, to see what the mapping makes of them. No file is changed.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of all random numbers.")
@click.option(
    "--png",
    "png_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write heat maps of H_res and of its products, and curves over depth. Needs matplotlib.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the report.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def command(
    target: str,
    settings: tuple[str, ...],
    full_size: bool,
    train: bool,
    random_logits: float | None,
    seed: int,
    png_file: Path | None,
    as_json: bool,
    quiet: bool,
    **flags: Any,
) -> None:
    """Run TARGET once with hyper-connections and measure what they do over depth.

    For every site: the largest absolute row sum (what a signal can grow by) and column sum (what a gradient can grow by) of its H_res and of the
    products of H_res, how far H_res is from doubly stochastic, and how far the streams differ. A model whose hyper-connections are not in --weights
    starts with them as backend="mhc" would: H_res near the identity, and streams that are copies of each other.

    Exit codes: 0 measured, 1 nothing is rewritten, 2 wrong usage.
    """
    if full_size and weights_given() is None:
        raise click.UsageError(
            "--full-size models have no memory without --weights FILE, and stability runs the model: leave it out, or --set sizes"
        )
    if png_file is not None:
        _check_png(png_file)
    options = backend_options(flags)
    import torch

    torch.manual_seed(seed)  # a factory may draw its weights and inputs
    loaded = open_target(target, settings, full_size=full_size, train=train)
    torch.manual_seed(seed)
    with progress(f"measuring {target}", quiet=quiet):
        result = _measure(loaded, options, random_logits)
    if png_file is not None and result.chains:
        result.plot(png_file)
    if as_json:
        print_json(result.to_dict())
    else:
        write(result)
        if png_file is not None and result.chains:
            click.echo(f"wrote {png_file}", err=True)
    if not result.chains:
        raise click.exceptions.Exit(1)


def _check_png(path: Path) -> None:
    from mhc_compile.errors import MhcError
    from mhc_compile.inspection.stream_stats.plots import require_matplotlib

    try:
        require_matplotlib()
    except MhcError as error:
        raise click.UsageError(f"--png: {error}") from None
    if not path.absolute().parent.is_dir():
        raise click.UsageError(f"--png: there is no directory {path.absolute().parent}")


def _measure(loaded: Target, options: dict[str, Any], random_logits: float | None) -> Stability:
    from torch import nn

    from mhc_compile.compilation.attach import attach
    from mhc_compile.inspection.stream_stats.measure import Meter, fill_residual_logits
    from mhc_compile.inspection.stream_stats.results import Stability

    model = loaded.model
    if not isinstance(model, nn.Module):
        raise click.UsageError(
            "an exported program has its hyper-connections as plain operations, which cannot be told apart: give the model that it was exported from"
        )
    if not attach(model, *loaded.args, options=options, **loaded.kwargs):
        return Stability(type(model).__name__, "train" if model.training else "eval", "", (), ())
    if random_logits is not None and not fill_residual_logits(model, random_logits):
        raise click.UsageError("--random-logits: the mapping 'identity' has no logits; choose another --mapping")
    meter = Meter(model, options=options)
    try:
        return meter.measure(loaded.args, loaded.kwargs)
    finally:
        meter.close()
