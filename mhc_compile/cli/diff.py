"""`mhc diff TARGET`: the graph before and after, in the terminal, as JSON, as a page, as a drawing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mhc_compile.cli.shared import Command, backend_options, open_target, print_json, progress, target_arguments, write

if TYPE_CHECKING:
    from mhc_compile.cli.targets import Target

__all__ = ["command"]

_FILE = click.Path(dir_okay=False, path_type=Path, allow_dash=True)


@click.command("diff", cls=Command)
@target_arguments
@click.option(
    "--stage",
    metavar="NAME",
    help="A stage (normalize, plan, expand, lower) or a pass against its predecessor; or two.  [default: capture..expand]",
)
@click.option("--side-by-side", is_flag=True, help="Two columns instead of one.")
@click.option("--all", "every", is_flag=True, help="Fold nothing: every node of every layer.")
@click.option(
    "--kernels", is_flag=True, help="What Inductor makes of the model, plain and rewritten. Compiles and runs it."
)
@click.option("--html", type=_FILE, metavar="FILE", help="Write one self-contained page.")
@click.option("--svg", type=_FILE, metavar="FILE", help="Draw the trunk before and after.")
@click.option("--dot", type=_FILE, metavar="FILE", help="The same drawing for Graphviz.")
@click.option("--mermaid", type=_FILE, metavar="FILE", help="The same drawing for Markdown.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; mhc_compile.ModelDiff.to_dict documents it.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def command(
    target: str,
    settings: tuple[str, ...],
    full_size: bool,
    train: bool,
    stage: str | None,
    side_by_side: bool,
    every: bool,
    kernels: bool,
    html: Path | None,
    svg: Path | None,
    dot: Path | None,
    mermaid: Path | None,
    as_json: bool,
    quiet: bool,
    **flags: Any,
) -> None:
    """Show what backend="mhc" changes in the graph of TARGET.

    \b
    mhc diff hf:llama
    mhc diff train.py:model --stage plan
    mhc diff hf:gpt2 --html diff.html --svg diff.svg
    mhc diff zoo:resnet --kernels

    +  added                 -  removed              ~  reads something else
    ±  replaced              ≡  runs on all streams  •  verdict of the plan

    Nothing of the model is run, but with --kernels. FILE may be - for stdout. Exit code 1 if nothing would be rewritten.
    """  # noqa: D301 - click's mark for lines that must stay
    from mhc_compile.inspection.diff.compare import diff
    from mhc_compile.reporting.base import render

    options = backend_options(flags)
    loaded = open_target(target, settings, full_size=full_size, train=train)
    if kernels:
        _kernels(loaded, options, as_json=as_json, quiet=quiet)
        return
    with progress(f"tracing {target}", quiet=quiet):
        found = diff(loaded.model, *loaded.args, options=options, stage=stage, **loaded.kwargs)
    files = ((html, found.to_html), (svg, found.to_svg), (dot, found.to_dot), (mermaid, found.to_mermaid))
    for path, make in files:
        if path is not None:
            _save(make(), path, quiet=quiet)
    if as_json:
        print_json(found.to_dict())
    elif not any(path for path, _ in files):
        write(render(found, side_by_side=side_by_side, every=every))
    if not any(graph.chains for graph in found.graphs):
        raise click.exceptions.Exit(1)


def _save(text: str, path: Path, *, quiet: bool) -> None:
    if str(path) == "-":
        click.echo(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    if not quiet:
        click.echo(f"wrote {path} ({len(text) / 1024:.0f} kB)", err=True)


def _kernels(loaded: Target, options: dict[str, Any], *, as_json: bool, quiet: bool) -> None:
    from mhc_compile.inspection.diff.kernels import kernels

    with progress(f"compiling {loaded.name}, plain and rewritten", quiet=quiet):
        found = kernels(loaded.model, *loaded.args, options=options, **loaded.kwargs)
    if as_json:
        print_json(found.to_dict())
    else:
        write(found)
