"""Plot of a `Stability`: heat maps of H_res and its products; gains and streams over depth."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mhc_compile.errors import MhcError
from mhc_compile.inspection.stream_stats.results import Stability
from mhc_compile.reporting.base import export

if TYPE_CHECKING:
    from collections.abc import Sequence

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


@export.register(Stability)
def draw(result: Stability, medium: str = "png") -> Any:  # noqa: ARG001 - the only one
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
    figure = Figure(figsize=(10, 8.4 * len(chains)), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.subfigures(len(chains), 1, squeeze=False)[:, 0]
    total = f" of {len(result.chains)}" if len(result.chains) > _CHAINS else ""
    for number, (part, chain) in enumerate(zip(parts, chains, strict=True), start=1):
        _chain(part, chain, result.model + (f", chain {number}{total}" if len(chains) > 1 else ""))
    return figure


def _chain(figure: Any, chain: ChainStability, title: str) -> None:
    facts = f"{len(chain.sites)} sites, {chain.streams} streams of width {chain.width}, {chain.sites[0].tokens} tokens"
    figure.suptitle(f"{title}: {facts}", fontsize=11)
    maps, curves = figure.subfigures(2, 1, height_ratios=[1.45, 1])
    chosen = _spread(len(chain.sites), _MAPS)
    axes = maps.subplots(2, len(chosen), squeeze=False)
    names = [_short(chain.sites[index].name) for index in chosen]
    products = [("$H_1$", "$H_{2} H_1$")[i] if i < 2 else f"$H_{{{i + 1}}} \\cdots H_1$" for i in chosen]
    means, composites = [chain.sites[i].mean for i in chosen], [chain.sites[i].composite for i in chosen]
    signed = any(value < 0 for matrix in (*means, *composites) for row in matrix for value in row)
    columns = (("H, one site", means, names), ("composite", composites, products))
    for row, (label, matrices, titles) in zip(axes, columns, strict=True):
        finite = (abs(value) for matrix in matrices for line in matrix for value in line if math.isfinite(value))
        top = max([1.0, *finite])
        for axis, matrix, title in zip(row, matrices, titles, strict=True):
            image = _heat(axis, matrix, top, signed=signed)
            axis.set_title(title, fontsize=8.5)
        maps.colorbar(image, ax=list(row), fraction=0.02, pad=0.01).ax.tick_params(labelsize=7)
        row[0].set_ylabel(label, fontsize=9.5)
    _curves(curves, chain)


def _curves(figure: Any, chain: ChainStability) -> None:
    gains, streams = figure.subplots(1, 2)
    ranks = streams.twinx()
    above: Any = {"frameon": False, "fontsize": 8, "loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 2}
    marker: Any = {"marker": "o", "markersize": 3} if len(chain.sites) <= 40 else {}
    lines = (
        ("forward, start to site", [site.composite_forward for site in chain.sites], _SIGNAL, "-", 2.4),
        ("backward, end to site", [site.remainder_backward for site in chain.sites], _GRADIENT, "--", 1.6),
        ("forward, site alone", [site.forward for site in chain.sites], _SIGNAL, ":", 1.2),
        ("backward, site alone", [site.backward for site in chain.sites], _GRADIENT, ":", 1.2),
    )
    for label, values, colour, style, thickness in lines:
        marks = marker if style != ":" else {}
        depth = range(1, len(values) + 1)
        gains.plot(depth, values, style, color=colour, label=label, linewidth=thickness, **marks)
    gains.axhline(1.0, color="0.6", linewidth=0.8)
    gains.set(yscale="log", xlabel="site l", ylabel="Amax gain (log scale)")
    _scale(gains, [value for _, values, *_ in lines for value in values])
    gains.legend(**above)
    cosines, sizes = zip(*((one.similarity, one.effective_rank) for one in chain.geometry), strict=True)
    places, marker["linewidth"] = range(1, len(cosines) + 1), 1.4
    similarity = streams.plot(places, cosines, color="tab:green", label="mean cosine", **marker)
    lowest = min([0.0, *filter(math.isfinite, cosines)]) - 0.05
    streams.set(
        ylim=(lowest, 1.05), ylabel="mean cosine of two streams", xlabel="streams entering site l (last: leaving)"
    )
    rank = ranks.plot(places, sizes, color="tab:purple", linestyle="--", label="effective rank", **marker)
    ranks.set(ylim=(0.9, chain.streams + 0.1), ylabel=f"effective rank (of {chain.streams})")
    streams.legend(handles=[*similarity, *rank], **above)
    for axis in (gains, streams):
        axis.xaxis.get_major_locator().set_params(integer=True)
    gains.spines["right"].set_visible(False)
    for axis in (gains, streams, ranks):
        axis.tick_params(labelsize=8)
        axis.spines["top"].set_visible(False)


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
    axis.set(xticks=[], yticks=[])
    return image


def _spread(count: int, wanted: int) -> list[int]:
    """Return at most `wanted` of `count` indices, from the first to the last."""
    shown = min(count, wanted)
    return [round(number * (count - 1) / max(shown - 1, 1)) for number in range(shown)]


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
