"""The results as a PNG: what every contender costs over the plain model, for one site and for a training step."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

from mhc_compile.tools.bench.conditions import sentence
from mhc_compile.tools.bench.names import LIMIT, PLAIN

if TYPE_CHECKING:
    from pathlib import Path

    from mhc_compile.tools.bench.result import Benchmark, Result, Row

__all__ = ["draw", "write_png"]

_OURS, _THEIRS, _LIMIT = "tab:orange", "tab:blue", "0.45"


def write_png(result: Result, path: Path) -> None:
    """Writes the figure, 160 pixels an inch."""
    draw(result).savefig(path)


def draw(result: Result) -> Any:
    """The matplotlib figure: a panel for each benchmark, bars with quartiles, shorter is better."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = max((len(_shown(benchmark)) for benchmark in result.benchmarks), default=1)
    panels = max(1, len(result.benchmarks))
    figure = Figure(figsize=(6.5 * panels, 2.0 + 0.45 * bars), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, benchmark in zip(figure.subplots(1, panels, squeeze=False)[0], result.benchmarks, strict=False):
        _panel(axes, benchmark)
    figure.supxlabel("\n".join(textwrap.wrap(sentence(result.conditions), 95 * panels)), fontsize=7, color="0.35")
    return figure


def _shown(benchmark: Benchmark) -> list[Row]:
    return [row for row in benchmark.rows if row.status == "ok" and row.name != PLAIN and row.extra and row.ratio]


def _panel(axes: Any, benchmark: Benchmark) -> None:
    """A step as time over plain in percent; a site in milliseconds, because the plain site is next to nothing."""
    rows = _shown(benchmark)[::-1]
    step = benchmark.kind == "step"
    for place, row in enumerate(rows):
        low, median, high = _values(row, step)
        colour = _OURS if row.name.startswith("ours") else _LIMIT if row.name == LIMIT else _THEIRS
        whiskers = [[max(0.0, median - low)], [max(0.0, high - median)]]
        axes.barh(place, median, xerr=whiskers, color=colour, height=0.65, error_kw={"elinewidth": 1, "capsize": 2})
        text = f"{median:+.0f} %" if step else f"{median:.2f} ms"
        axes.annotate(text, (max(high, 0.0), place), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.axvline(0.0, color="0.3", linewidth=0.8)
    axes.margins(x=0.18)
    axes.set_xlabel(
        "training step over the plain model, %" if step else "one site over a plain add, forward + backward, ms"
    )
    axes.set_title(
        f"{'Training step' if step else 'One site'}, median and quartiles of {benchmark.rounds} rounds", fontsize=10
    )
    axes.grid(axis="x", alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def _values(row: Row, step: bool) -> tuple[float, float, float]:
    assert row.extra is not None
    if step:
        total = row.ratio["total"]
        return 100 * (total.low - 1), 100 * (total.median - 1), 100 * (total.high - 1)
    return 1000 * row.extra.low, 1000 * row.extra.median, 1000 * row.extra.high
