"""`mhc scaling`."""

from __future__ import annotations

import click

from mhc_compile.cli.shared import Command, print_json, progress, write
from mhc_compile.errors import OptionError


@click.command("scaling", cls=Command)
@click.option("--width", type=click.IntRange(1), help="C of a dense decoder of your own; with --layers.")
@click.option("--layers", type=click.IntRange(1), help="Its blocks, two residual adds each.")
@click.option("--heads", type=click.IntRange(1), help="Its attention heads. [default: C / 128]")
@click.option("--hidden", type=click.IntRange(1), help="Width of its gated feed-forward branch. [default: about 8/3 C]")
@click.option("--vocabulary", type=click.IntRange(1), default=129280, show_default=True, help="Rows of its embedding.")
@click.option("--tokens", type=click.IntRange(1), default=4096, show_default=True, help="Of one of its sequences.")
@click.option("--streams", type=int, default=4, show_default=True, help="n, the number of residual streams.")
@click.option("--mapping", default="sinkhorn", show_default=True, help="The family of H_res.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--markdown", "as_markdown", is_flag=True, help="Print Markdown.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def command(streams: int, mapping: str, as_json: bool, as_markdown: bool, quiet: bool, **sizes: int | None) -> None:
    """Estimate the cost of hyper-connections at 3B to 671B, and at a size of your own.

    Parameters, bytes, memory and time are counts and rooflines, those of `mhc explain`; nothing is
    measured. A size of your own is --width and --layers.
    """
    from mhc_compile.config.options import Options
    from mhc_compile.tools.scaling.estimate import estimate
    from mhc_compile.tools.scaling.report import markdown, view
    from mhc_compile.tools.scaling.shapes import SHAPES, Shape

    own = {name: size for name, size in sizes.items() if size is not None}
    if ("width" in own) != ("layers" in own):
        raise click.UsageError("a size of your own needs both --width and --layers")
    if "width" not in own and ("heads" in own or "hidden" in own):
        raise click.UsageError("--heads and --hidden are of a size of your own, which needs --width and --layers")
    try:
        options = Options.parse({"streams": streams, "mapping": mapping})
        shapes = [*([Shape.of(**own)] if "width" in own else []), *SHAPES]
    except OptionError as error:
        raise click.UsageError(str(error)) from error
    estimates = []
    for shape in shapes:
        with progress(f"tracing {shape.name}", quiet=quiet):
            estimates.append(estimate(shape, options))
    if as_json:
        print_json({"estimates": [one.to_dict() for one in estimates]})
    elif as_markdown:
        click.echo(markdown(estimates))
    else:
        write(view(estimates))
