"""The results as rich tables: one for each benchmark, and a line of conditions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from mhc_compile.tools.bench.conditions import sentence

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from mhc_compile.tools.bench.result import Benchmark, Counters, PerSite, Result, Row

__all__ = ["WIDE", "render", "tables"]

#: From this width on, all columns are one table.
WIDE = 130
_TITLES = {
    "site": "One site: the write of a site and the read of the next",
    "step": "One training step: forward, backward, AdamW",
}
_LEGENDS = {
    "site": (
        "ms: median (quartiles of both together). × plain: of the same rounds. of limit: limit / this. kernels: that Inductor generated + calls of"
        " other operators. MB: read and written, by Inductor's count; the limit's by hand. saved, peak, compile: as below."
    ),
    "step": (
        "+ ms/site, kernels/site and MB/site: (this − plain) / sites. saved: alive between forward and backward; saved and peak are over what was"
        " there before the step. compile: the first forward and backward, from empty caches."
    ),
}


def render(console: Console, result: Result) -> None:
    """Prints everything."""
    for benchmark in result.benchmarks:
        title = f"{_TITLES[benchmark.kind]}; {benchmark.rounds} round{'s' * (benchmark.rounds != 1)}"
        console.print(Text(title, style="italic"))
        for view in tables(benchmark, console.width):
            console.print(view)
        console.print(Text(_LEGENDS[benchmark.kind], style="dim"))
        for row in benchmark.rows:
            if row.message:
                style = "yellow" if row.status == "missing" else "red"
                console.print(Text(f"{row.name}: {row.message}", style=style), soft_wrap=True)
        console.print()
    console.print(Text(sentence(result.conditions)), soft_wrap=True)
    if result.interrupted:
        console.print(Text("Interrupted: complete rounds only.", style="yellow"))


def tables(benchmark: Benchmark, width: int) -> list[Table]:
    """One row for each contender; where a terminal of `width` columns is too narrow, times and counts are two tables, one below the other."""
    per = "\n/site" if benchmark.kind == "step" else ""
    times = ("forward\nms", "backward\nms", "total ms\n(quartiles)", "×\nplain", "+ ms\n/site", "of\nlimit")
    counts = (f"kernels{per}", f"MB{per}", "saved\nMB", "peak\nMB", "compile\ns")
    if width >= WIDE:
        return [_table(benchmark, (*times, *counts), slice(None))]
    split = len(times)
    return [_table(benchmark, times, slice(split)), _table(benchmark, counts, slice(split, None))]


def _table(benchmark: Benchmark, titles: Sequence[str], part: slice) -> Table:
    view = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    view.add_column("contender", no_wrap=True)
    for one in titles:
        view.add_column(one, justify="right", min_width=16 if "quartiles" in one else None)
    for row in benchmark.rows:
        if row.status == "ok":
            view.add_row(row.name, *_cells(row, benchmark.kind == "step")[part])
        elif part.start is None:
            view.add_row(Text(row.name, style="yellow" if row.status == "missing" else "red"), row.status)
    return view


def _cells(row: Row, step: bool) -> Sequence[str]:
    total = row.seconds["total"]
    counted = row.plus if step else row.counters
    return (
        _ms(row.seconds["forward"].median),
        _ms(row.seconds["backward"].median),
        f"{_ms(total.median)} ({_ms(total.low)}–{_ms(total.high)})",
        f"{row.ratio['total'].median:.2f}" if row.ratio else "–",
        _ms(row.extra.median) if row.extra else "–",
        f"{100 * row.share:.0f} %" if row.share is not None else "–",
        _kernels(counted),
        _megabytes(counted),
        _million(row.saved_bytes),
        _million(row.peak_bytes),
        f"{row.compile_seconds:.1f}" if row.compile_seconds is not None else "–",
    )


def _ms(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"


def _million(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e6:.1f}"


def _kernels(counters: Counters | PerSite | None) -> str:
    if counters is None or not (counters.kernels or counters.externs):
        return "–"
    return f"{counters.kernels:.3g} + {counters.externs:.3g}"


def _megabytes(counters: Counters | PerSite | None) -> str:
    return "–" if counters is None or not counters.bytes else f"{counters.bytes / 1e6:.1f}"
