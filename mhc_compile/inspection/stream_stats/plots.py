"""Plot of a `Stability`: heat maps of H_res and its products; gains and streams over depth."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mhc_compile.errors import MhcError
from mhc_compile.inspection.stream_stats.results import Stability, write_plot

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mhc_compile.inspection.stream_stats.results import ChainStability, Matrix

#: Largest number of sites with a heat map, spread over the chain.
_MAPS = 5
#: Largest number of chains; models with more have similar ones in the branches of every block.
_CHAINS = 8
_SIGNAL, _GRADIENT = "tab:blue", "tab:orange"


def require_matplotlib() -> None:
    """Raise MhcError unless matplotlib is installed."""
    if find_spec("matplotlib") is None:
        raise MhcError('a plot needs matplotlib, which is not installed: pip install "matplotlib>=3.8"')


@write_plot.register(Stability)
def _write_png(result: Stability, path: str | Path) -> None:
    """Write `draw(result)` to `path`: a PNG whatever its name, 160 dots an inch."""
    draw(result).savefig(path, format="png")


def draw(result: Stability) -> Any:
    """Return a matplotlib figure: heat maps of sites and composites, and two panels over depth.

    Raises:
        MhcError: matplotlib is not installed, or there is no chain to draw.
    """
    require_matplotlib()
    if not result.chains:
        raise MhcError(f"{result.model}: no site ran on streams, so that there is nothing to plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    chains = result.chains[:_CHAINS]
    count, left = len(chains), len(result.chains) - len(chains)
    figure = Figure(figsize=(10, 8.4 * count), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(count, 1, squeeze=False)[:, 0]
    for number, (part, chain) in enumerate(zip(parts, chains, strict=True)):
        name = f", chain {number + 1}" + (f" of {len(result.chains)}" if left else "") if count > 1 else ""
        _chain(part, chain, f"{result.model}{name}")
    return figure


def _chain(figure: Any, chain: ChainStability, title: str) -> None:
    facts = f"{len(chain.sites)} sites, {chain.streams} streams of width {chain.width}, {chain.sites[0].tokens} tokens"
    figure.suptitle(f"{title}: {facts}", fontsize=11)
    maps, curves = figure.subfigures(2, 1, height_ratios=[1.45, 1])
    chosen = _spread(len(chain.sites), _MAPS)
    axes = maps.subplots(2, len(chosen), squeeze=False)
    matrices = [[site.mean for site in chain.sites], [site.composite for site in chain.sites]]
    tops = [_largest(every, chosen) for every in matrices]
    signed = any(value < 0 for row in matrices for index in chosen for line in row[index] for value in line)
    for row, (kind, every) in enumerate(zip(("site", "composite"), matrices, strict=True)):
        for column, index in enumerate(chosen):
            name = chain.sites[index].name
            if kind == "composite":
                name = ("$H_1$", "$H_{2} H_1$")[index] if index < 2 else f"$H_{{{index + 1}}} \\cdots H_1$"
            image = _heat(axes[row][column], every[index], tops[row], signed=signed)
            axes[row][column].set_title(_short(name), fontsize=8.5)
        bar = maps.colorbar(image, ax=list(axes[row]), fraction=0.02, pad=0.01)
        bar.ax.tick_params(labelsize=7)
        axes[row][0].set_ylabel("H, one site" if kind == "site" else "composite", fontsize=9.5)
    _curves(curves, chain)


def _curves(figure: Any, chain: ChainStability) -> None:
    gains, streams = figure.subplots(1, 2)
    depth = range(1, len(chain.sites) + 1)
    above: Any = {"frameon": False, "fontsize": 8, "loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 2}
    marker = {"marker": "o", "markersize": 3} if len(chain.sites) <= 40 else {}
    lines = (
        ("forward, start to site", [site.composite_forward for site in chain.sites], _SIGNAL, "-", 2.4),
        ("backward, end to site", [site.remainder_backward for site in chain.sites], _GRADIENT, "--", 1.6),
        ("forward, site alone", [site.forward for site in chain.sites], _SIGNAL, ":", 1.2),
        ("backward, site alone", [site.backward for site in chain.sites], _GRADIENT, ":", 1.2),
    )
    for label, values, colour, style, thickness in lines:
        marks = marker if style != ":" else {}
        gains.plot(depth, values, style, color=colour, label=label, linewidth=thickness, **marks)
    gains.axhline(1.0, color="0.6", linewidth=0.8)
    gains.set_yscale("log")
    _scale(gains, [value for _, values, *_ in lines for value in values])
    gains.set_xlabel("site l")
    gains.set_ylabel("Amax gain (log scale)")
    gains.legend(**above)
    geometry = chain.geometry
    places = range(1, len(geometry) + 1)
    similarity = streams.plot(
        places, [one.similarity for one in geometry], color="tab:green", label="mean cosine", linewidth=1.4, **marker
    )
    streams.set_ylim(min([0.0, *(one.similarity for one in geometry if math.isfinite(one.similarity))]) - 0.05, 1.05)
    streams.set_xlabel("streams entering site l (last: leaving)")
    streams.set_ylabel("mean cosine of two streams")
    other = streams.twinx()
    rank_style: Any = {"color": "tab:purple", "linestyle": "--", "linewidth": 1.4, **marker}
    rank = other.plot(places, [one.effective_rank for one in geometry], label="effective rank", **rank_style)
    other.set_ylim(0.9, chain.streams + 0.1)
    other.set_ylabel(f"effective rank (of {chain.streams})")
    streams.legend(handles=[*similarity, *rank], **above)
    for axis in (gains, streams):
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.tick_params(labelsize=8)
        axis.spines["top"].set_visible(False)
    gains.spines["right"].set_visible(False)
    other.spines["top"].set_visible(False)
    other.tick_params(labelsize=8)


def _scale(axis: Any, values: Sequence[float]) -> None:
    """Show at least 0.5 to 2, where noise is no trend; write out the ticks within one decade."""
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    known = [value for value in values if 0 < value < math.inf]
    low, high = min([0.5, *(value / 1.2 for value in known)]), max([2.0, *(value * 1.2 for value in known)])
    axis.set_ylim(low, high)
    if high / low < 20:
        ticks = (0.1, 0.2, 0.5, 1, 2, 5, 10)
        axis.yaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_locator(NullLocator())


def _heat(axis: Any, matrix: Matrix, top: float, *, signed: bool) -> Any:
    """Draw a matrix with its entries, its row sums at the right and its column sums below."""
    from matplotlib.colors import Normalize, SymLogNorm

    # From 0, or −top, to top; logarithmic beyond 1 for large products.
    n, low = len(matrix), -top if signed else 0.0
    norm = SymLogNorm(1.0, vmin=low, vmax=top) if top > 10 else Normalize(low, top)
    image = axis.imshow(matrix, cmap="RdBu_r" if signed else "Blues", norm=norm)
    size = 7.5 if n <= 4 else 5.5
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            dark = abs(norm(value) - 0.5 * signed) > 0.6 - 0.25 * signed
            if n <= 8:
                axis.text(j, i, _number(value), ha="center", va="center", fontsize=size, color="w" if dark else "k")
        axis.text(n - 0.4, i, _number(sum(row)), ha="left", va="center", fontsize=size, color=_SIGNAL)
    for j in range(n):
        total = _number(sum(row[j] for row in matrix))
        axis.text(j, n - 0.4, total, ha="center", va="top", fontsize=size, color=_GRADIENT)
    axis.set_xticks([])
    axis.set_yticks([])
    return image


def _largest(matrices: Sequence[Matrix], chosen: Sequence[int]) -> float:
    """Return the largest finite magnitude, at least 1."""
    every = (abs(value) for index in chosen for row in matrices[index] for value in row)
    return max([1.0, *filter(math.isfinite, every)])


def _spread(count: int, wanted: int) -> list[int]:
    """Return at most `wanted` of `count` indices, from the first to the last."""
    if count <= wanted:
        return list(range(count))
    return [round(number * (count - 1) / (wanted - 1)) for number in range(wanted)]


def _short(name: str) -> str:
    """Return the last parts of a path, as many as fit over a map."""
    parts = name.split(".")
    while len(parts) > 2 and len(".".join(parts)) > 18:
        parts = parts[1:]
    return ".".join(parts)


def _number(value: float) -> str:
    """Return a number with three digits."""
    size = abs(value)
    if size < 999.5:
        return f"{value:.{2 if size < 9.995 else 1 if size < 99.95 else 0}f}"
    return f"{value:.0e}".replace("e+0", "e").replace("e+", "e")
