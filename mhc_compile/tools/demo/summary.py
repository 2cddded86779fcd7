"""The end of the demo on stdout: what was rewritten, what was measured, and what it does not say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from mhc_compile.tools.demo.plots import conditions_line, terminal_plots

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from mhc_compile.results import Explanation

__all__ = ["CAUTION", "print_summary"]

CAUTION = (
    "A run this short and small shows that the rewrite trains, what it costs here and that it stays stable."
    " It says nothing about the benefit of hyper-connections at scale."
)


def print_summary(console: Console, result: dict[str, Any], explanation: Explanation, files: list[Path]) -> None:
    """Prints the site report, both plots, the table of figures, and the files that were written."""
    console.print(explanation)
    console.print()
    for plot in terminal_plots(result, min(console.width, 100) - 1):
        console.print(Text.from_ansi(plot.rstrip("\n")), soft_wrap=True)
    console.print(f"After {result['steps']} steps: {conditions_line(result)}", markup=False, highlight=False)
    console.print(_table(result))
    for line in _lines(result):
        console.print(line, markup=False, highlight=False)
    console.print(f"Written: {', '.join(map(str, files))}", markup=False, highlight=False, soft_wrap=True)


def _table(result: dict[str, Any]) -> Table:
    plain, mhc = result["plain"], result["mhc"]
    unit = "bytes" if result["unit"] == "byte" else "patches"
    table = Table()
    table.add_column("")
    table.add_column("plain", justify="right")
    table.add_column("mhc", justify="right")
    rows = [
        ("parameters", *(f"{side['parameters']:,}" for side in (plain, mhc))),
        ("loss before any update", *(f"{side['loss'][0]:.6f}" for side in (plain, mhc))),
        ("training loss, last 20 steps", *(f"{side['final']:.4f}" for side in (plain, mhc))),
        ("validation loss", *(f"{side['validation'][-1][1]:.4f}" for side in (plain, mhc))),
        ("median step", *(f"{1000 * side['step_seconds']:.1f} ms" for side in (plain, mhc))),
        (f"{unit} per second", *(f"{side['tokens_per_second']:,.0f}" for side in (plain, mhc))),
        ("compilation", *(_seconds(side["compile_seconds"]) for side in (plain, mhc))),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _seconds(values: list[float]) -> str:
    return " + ".join(f"{value:.1f}" for value in values) + " s"


def _lines(result: dict[str, Any]) -> list[str]:
    data, gain, distances = result["data"], result["gain"], result["streams_distance"]
    return [
        f"Same start: the losses before any update differ by {abs(result['first_step']['difference']):.1e}.",
        f"Speed: mhc runs at {result['ratio']:.2f} × the plain model's tokens per second"
        f" (medians of steps run in turn, {result['conditions']['threads']} threads,"
        f" {result['conditions']['wait_policy']} waiting).",
        f"Gain of the composite H_res, Amax over {result['overrides']} sites:"
        f" {gain['forward']:.4f} forward, {gain['backward']:.4f} backward"
        " (1 is neither growth nor decay).",
        f"Streams: they differ from their mean by {100 * max(distances):.1f} % of it"
        " at the entry of the site where they differ most"
        " (0 % at the start).",
        f"Data: {data['train']['files']} files to train on, {data['validation']['files']} others to validate on,"
        f" {(data['train']['bytes'] + data['validation']['bytes']) / 1e6:.1f} MB of this Python's standard library."
        f" A uniform guess has loss {result['chance']:.2f}.",
        CAUTION,
    ]
