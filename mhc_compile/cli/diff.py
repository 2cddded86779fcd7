"""`mhc diff TARGET`: the graph before and after, as text, JSON, a page or a drawing."""

from __future__ import annotations

from pathlib import Path

import click

from mhc_compile.cli.shared import ModelCall, model_command

_FILE = click.Path(dir_okay=False, path_type=Path, allow_dash=True)


@model_command("diff")
@click.option(
    "--stage",
    metavar="NAME",
    help="A stage (normalize, plan, expand, lower) or a pass, compared with its predecessor; or two."
    "  [default: capture..expand]",
)
@click.option("--side-by-side", is_flag=True, help="Two columns instead of one.")
@click.option("--all", "every", is_flag=True, help="Fold nothing: every node of every layer.")
@click.option("--kernels", is_flag=True, help="Kernels of Inductor, plain and rewritten. Compiles and runs the model.")
@click.option("--html", type=_FILE, metavar="FILE", help="Write one self-contained page.")
@click.option("--svg", type=_FILE, metavar="FILE", help="Draw the trunk before and after.")
@click.option("--dot", type=_FILE, metavar="FILE", help="The same drawing for Graphviz.")
@click.option("--mermaid", type=_FILE, metavar="FILE", help="The same drawing for Markdown.")
def command(
    call: ModelCall, *, stage: str | None, side_by_side: bool, every: bool, kernels: bool, **files: Path | None
) -> None:
    """Show what backend="mhc" changes in the graph of TARGET.

    \b
    mhc diff hf:llama
    mhc diff train.py:model --stage plan
    mhc diff hf:gpt2 --html diff.html --svg diff.svg
    mhc diff zoo:resnet --kernels

    +  added                 -  removed              ~  reads something else
    ±  replaced              ≡  runs on all streams  •  verdict of the plan

    Only --kernels runs the model. FILE may be - for stdout. Exit code 1 if nothing is rewritten.
    """  # noqa: D301 - click's mark for lines that must not be wrapped
    loaded = call.loaded
    if kernels:
        from mhc_compile.inspection.diff import kernels as launches

        with call.progress("compiling plain and rewritten"):
            counted = launches.kernels(loaded.model, *loaded.args, options=call.options, **loaded.kwargs)
        call.show(counted)
        return
    from mhc_compile.inspection.diff.compare import diff
    from mhc_compile.reporting.base import export

    with call.progress("tracing"):
        found = diff(loaded.model, *loaded.args, options=call.options, stage=stage, **loaded.kwargs)
    for medium in ("html", "svg", "dot", "mermaid"):
        if (path := files[medium]) is None:
            continue
        text = export(found, medium)
        if str(path) == "-":
            click.echo(text)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        if not call.quiet:
            click.echo(f"wrote {path} ({len(text) / 1024:.0f} kB)", err=True)
    if call.as_json or not any(files.values()):
        call.show(found, side_by_side=side_by_side, every=every)
    if not any(graph.chains for graph in found.graphs):
        raise click.exceptions.Exit(1)
