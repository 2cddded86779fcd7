"""The figures of the summary as pictures, in colours that colour-blind people tell apart."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from experiment.plan import has_streams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

#: Okabe and Ito's palette; the dashes distinguish the lines in grey as well.
STYLES: dict[str, tuple[str, Any]] = {
    "plain": ("#000000", "-"),
    "HC": ("#D55E00", (0, (5, 1))),
    "mHC": ("#0072B2", "-"),
    "identity": ("#009E73", (0, (3, 1, 1, 1))),
    "permutations": ("#CC79A7", (0, (1, 1))),
    "kronecker": ("#B8860B", (0, (5, 1, 1, 1))),
    "gain0.3": ("#56B4E9", "-"),
    "paper": ("#56B4E9", (0, (5, 1))),
    "static": ("#0072B2", (0, (3, 1))),
    "HC-fast": ("#E69F00", (0, (5, 1))),
    "scalars": ("#707070", (0, (1, 1))),
}
#: Variants that belong to other tables than the main one.
OTHER: tuple[str, Any] = ("#A0A0A0", "-")


def draw_all(summary: dict[str, Any], folder: Path) -> list[Path]:
    """Write the pictures that there are figures for, in 255 colours: a third of the size."""
    import numpy
    from PIL import Image

    pictures: dict[str, Callable[[dict[str, Any]], Any]] = {}
    pictures |= {"loss.png": _losses, "norm.png": _norms, "gain.png": _gains}
    if any(figures["difference"] for entries in summary["rates"].values() for figures in entries.values()):
        pictures["difference.png"] = _differences
    if summary["cost"] is not None and "plain" in summary["settings"]["variants"]:
        pictures["cost.png"] = _cost
    for name, draw in pictures.items():
        canvas = draw(summary).canvas
        canvas.draw()
        picture = Image.fromarray(numpy.asarray(canvas.buffer_rgba())).convert("RGB")
        picture.quantize(255, dither=Image.Dither.NONE).save(folder / name, optimize=True)
    return [folder / name for name in pictures]


def _figure(rows: int, columns: int, height: float, **how: Any) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **how)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.2)
    return figure, axes


def _label_ends(ax: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write names next to the ends of lines, pushed apart where they would overlap."""
    low, high = ax.get_ylim()
    gap = (high - low) * 0.075
    ordered = sorted(ends)
    places: list[float] = []
    for y, _, _ in ordered:
        places.append(max(y, places[-1] + gap) if places else y)
    ceiling = high
    for i in reversed(range(len(places))):
        places[i] = min(places[i], ceiling)
        ceiling = places[i] - gap
    for (_, name, colour), place in zip(ordered, places, strict=True):
        ax.annotate(
            name,
            (1.0, place), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
            color=colour, va="center", fontsize=8.5, annotation_clip=False,
        )  # fmt: skip


def _lines(ax: Any, curves: dict[str, list[list[Any]]], *, band: bool, marker: str = "") -> None:
    """Draw [step, value, low, high] points by variant."""
    ends = []
    for variant, points in curves.items():
        if not points:
            continue
        colour, dashes = STYLES.get(variant, OTHER)
        steps, values, lows, highs = zip(*points, strict=True)
        ax.plot(steps, values, color=colour, linestyle=dashes, linewidth=1.4, marker=marker, markersize=4)
        if band and None not in lows:
            ax.fill_between(steps, lows, highs, color=colour, alpha=0.12, linewidth=0)
        ends.append((values[-1], variant, colour))
    _label_ends(ax, ends)


def _losses(summary: dict[str, Any]) -> Any:
    rates = summary["rates"]
    figure, axes = _figure(2, len(rates), 6.2, sharex=True, height_ratios=[3, 2])
    for column, (rate, entries) in enumerate(rates.items()):
        above, below = axes[0][column], axes[1][column]
        _lines(above, {v: f["curve"] for v, f in entries.items()}, band=False)
        above.set_title(f"learning rate {rate}", fontsize=10)
        below.axhline(0.0, color="0.4", linewidth=0.8)
        _lines(below, {v: f["gap"] for v, f in entries.items()}, band=True)
        below.set_xlabel("step")
    axes[0][0].set_ylabel("training loss, nats a byte\n(mean of 20 steps and all seeds)")
    axes[1][0].set_ylabel("minus plain, seed by seed\n(mean, 95 % band)")
    return figure


def _forest(ax: Any, rows: Sequence[tuple[str, dict[str, Any] | None]]) -> None:
    """Draw a row for each variant: the mean, its interval, and every seed's value."""
    for y, (variant, interval) in enumerate(rows):
        if interval is None:
            continue
        colour = STYLES.get(variant, OTHER)[0]
        if interval["low"] is not None:
            ax.plot([interval["low"], interval["high"]], [y, y], color=colour, linewidth=2)
        ax.plot(interval["value"], y, "o", color=colour, markersize=7)
        values = interval.get("values", [])
        ax.plot(values, [y + 0.25] * len(values), "|", color=colour, markersize=7)
    ax.set_yticks(range(len(rows)), [variant for variant, _ in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)


def _differences(summary: dict[str, Any]) -> Any:
    rates = summary["rates"]
    figure, axes = _figure(1, len(rates), 2.9, sharey=True)
    for ax, (rate, entries) in zip(axes[0], rates.items(), strict=True):
        ax.axvline(0.0, color="0.4", linewidth=0.8)
        _forest(ax, [(variant, figures["difference"]) for variant, figures in entries.items() if variant != "plain"])
        ax.set_title(f"learning rate {rate}", fontsize=10)
        ax.set_xlabel("final validation loss minus plain's, nats a byte")
    figure.suptitle("Left of 0 is better than plain. Dot and bar: mean and 95 % interval; ticks: seeds", fontsize=9)
    return figure


def _norms(summary: dict[str, Any]) -> Any:
    rates = summary["rates"]
    figure, axes = _figure(1, len(rates), 3.2, sharey=True)
    for ax, (rate, entries) in zip(axes[0], rates.items(), strict=True):
        _lines(ax, {v: f["norm"] for v, f in entries.items()}, band=False)
        ax.set_title(f"learning rate {rate}", fontsize=10)
        ax.set_xlabel("step")
    _powers(axes[0][0])
    axes[0][0].set_ylabel("global gradient norm\n(geometric mean of the seeds)")
    return figure


def _gains(summary: dict[str, Any]) -> Any:
    rates = summary["rates"]
    figure, axes = _figure(2, len(rates), 5.4, sharex=True, sharey="row")
    for row, name in enumerate(("forward", "backward")):
        shown = {
            rate: {v: [_logs(point) for point in f["gain"][name]] for v, f in entries.items() if has_streams(v)}
            for rate, entries in rates.items()
        }
        heights = [height for some in shown.values() for points in some.values() for _, height, *_ in points]
        # Bands of few seeds reach far; the axis shows the means.
        axes[row][0].set_ylim(min([-0.05, *heights]) * 1.1, max([0.35, *heights]) * 1.15)
        for column, some in enumerate(shown.values()):
            axes[row][column].axhline(0.0, color="0.4", linewidth=0.8)
            _lines(axes[row][column], some, band=True, marker="o")
        _powers(axes[row][0])
        axes[row][0].set_ylabel(f"Amax, {name}")
    for column, rate in enumerate(rates):
        axes[0][column].set_title(f"learning rate {rate}", fontsize=10)
        axes[1][column].set_xlabel("step")
    figure.suptitle(
        "Composite H_res over depth: geometric mean and 95 % band; 1 is neither growth nor decay", fontsize=9
    )
    return figure


def _logs(point: list[Any]) -> list[Any]:
    step, *values = point
    return [step, *(None if value is None else math.log10(max(value, 1e-3)) for value in values)]


def _powers(ax: Any) -> None:
    """Name the ticks of an axis of decimal logarithms by the numbers themselves."""
    low, high = ax.get_ylim()
    every = max(1, round((high - low) / 6))
    marks = [m * 10.0**e for e in range(-3, 40) for m in ((1, 2, 5) if high - low < 2 else (1,))]
    marks = [mark for mark in marks if low <= math.log10(mark) <= high and round(math.log10(mark) // 1) % every == 0]
    names = [f"{mark:g}" if mark < 1e4 else f"$10^{{{math.log10(mark):.0f}}}$" for mark in marks]
    ax.set_yticks([math.log10(mark) for mark in marks], names)


def _cost(summary: dict[str, Any]) -> Any:
    entries = summary["cost"]["variants"]
    figure, axes = _figure(1, 2, 2.6, sharey=True)
    shown = [variant for variant in entries if variant != "plain"]
    axes[0][0].axvline(1.0, color="0.4", linewidth=0.8)
    _forest(axes[0][0], [(variant, entries[variant]["ratio"]) for variant in shown])
    axes[0][0].set_xlabel("time of a training step over plain's")
    axes[0][1].axvline(1.0, color="0.4", linewidth=0.8)
    peaks = [(v, {"value": entries[v]["peak_ratio"], "low": None, "high": None}) for v in shown]
    _forest(axes[0][1], peaks)
    axes[0][1].set_xlabel("peak memory of a step over plain's")
    return figure
