"""Renders a `Stability` for the terminal: a headline and a table with a row for each site, for every chain."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

    from mhc_compile.diagnostics.result import ChainStability, Stability, Weights

__all__ = ["render"]

#: From this width on, the weights have columns of their own.
_WIDE = 108
#: Below it, only what a chain is judged by.
_NARROW = 76

_LEGEND = (
    "Amax: largest absolute row sum (↑, of a signal) and column sum (↓, of a gradient), averaged over tokens; 1 is neither growth nor decay."
    " site: of its H_res alone; so far: of the product from the chain's start; to the end: of the product from the site on."
    " off: largest |row sum − 1| and |column sum − 1| of any token. cos: mean cosine of two streams; rank: effective rank of the streams, both at the"
    " site's entry."
)


def render(result: Stability) -> RenderableType:
    """The report: every chain, what the columns mean, and remarks."""
    parts: list[RenderableType] = [_headline(result)]
    for number, chain in enumerate(result.chains):
        parts += [Text(), _chain_line(chain, number, len(result.chains)), _Sites(chain)]
    parts += [Text(), Text(_LEGEND, style="dim")]
    if result.remarks:
        parts.append(Text())
    parts += [Text(f"{remark}.", style="yellow") for remark in result.remarks]
    return Group(*parts)


class _Sites:
    """The table of a chain, with as many columns as the terminal has room for."""

    def __init__(self, chain: ChainStability) -> None:
        self._chain = chain

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield _sites(self._chain, options.max_width)


def _headline(result: Stability) -> Text:
    text = Text()
    text.append(f"{result.model}: residual mixing over depth", style="bold")
    chains = len(result.chains)
    text.append(
        f", {result.mode}, {result.dtype or 'nothing ran on streams'}, {len(result.sites)} sites in {chains} chain{'s'[: chains != 1]}"
    )
    return text


def _chain_line(chain: ChainStability, number: int, count: int) -> Text:
    text = Text()
    if count > 1:
        text.append(f"chain {number + 1}: ", style="cyan")
    text.append(f"{len(chain.sites)} sites, {chain.streams} streams of {chain.width}, {chain.sites[0].tokens} tokens; ")
    text.append("largest gain ")
    text.append(f"{_gain(chain.amax_forward)} forward, {_gain(chain.amax_backward)} backward", style="bold")
    text.append(f"; streams leave with cosine {chain.leaving.similarity:.3f}, rank {chain.leaving.effective_rank:.2f}")
    return text


def _sites(chain: ChainStability, width: int) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("site", overflow="fold")
    groups = [("so far", True), ("to the end", True), ("site", width >= _NARROW)]
    for name, shown in groups:
        if shown:
            table.add_column(f"{name} ↑", justify="right", no_wrap=True)
            table.add_column("↓", justify="right", no_wrap=True)
    if width >= _NARROW:
        table.add_column("off row", justify="right", no_wrap=True)
        table.add_column("col", justify="right", no_wrap=True)
    table.add_column("cos", justify="right", no_wrap=True)
    table.add_column("rank", justify="right", no_wrap=True)
    if width >= _WIDE:
        table.add_column("pre", no_wrap=True)
        table.add_column("post", no_wrap=True)
    for site in chain.sites:
        gains = [site.composite_forward, site.composite_backward, site.remainder_forward, site.remainder_backward]
        cells = [site.name, *map(_gain, gains)]
        if width >= _NARROW:
            cells += [_gain(site.forward), _gain(site.backward), _error(site.row_error), _error(site.column_error)]
        cells += [f"{site.entering.similarity:.3f}", f"{site.entering.effective_rank:.2f}"]
        if width >= _WIDE:
            cells += [_means(site.pre), _means(site.post)]
        table.add_row(*cells)
    return table


def _gain(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:.1e}"


def _error(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def _means(weights: Weights) -> str:
    return " ".join(f"{value:.2f}".removeprefix("0") for value in weights.mean)
