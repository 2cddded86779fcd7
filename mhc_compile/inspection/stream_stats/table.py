"""Renders a `Stability` for the terminal: a headline and a table with a row for each site, for every chain."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

    from mhc_compile.inspection.stream_stats.result import ChainStability, SiteStability, Stability, Weights

__all__ = ["render"]

#: How much of a site is shown: all, without single sites and weights, only what a chain is judged by.
_DETAILS = (2, 1, 0)

_LEGEND = (
    "Amax, averaged over tokens: ↑ largest absolute row sum, which a signal can grow by, ↓ column sum, which a gradient can grow by; 1 is neither"
    " growth nor decay. So far: of the product of H_res from the chain's start; to the end: from the site on. Off: the largest deviation of a row or"
    " column sum from 1. Of the streams at the site's entry: cos, the mean cosine of two; rank, their effective rank."
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
        tables = [_sites(self._chain, detail) for detail in _DETAILS]
        room, boundless = options.max_width, options.update_width(10_000)
        yield next((one for one in tables if Measurement.get(console, boundless, one).maximum <= room), tables[-1])


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
    text.append(
        f"; streams leave with cosine {_cosine(chain.leaving.similarity)}, rank {chain.leaving.effective_rank:.2f}"
    )
    return text


def _sites(chain: ChainStability, detail: int) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("site", overflow="fold")
    for name, _ in _columns(chain.sites[0], detail):
        table.add_column(name, justify="right", no_wrap=True)
    for site in chain.sites:
        table.add_row(site.name, *(cell for _, cell in _columns(site, detail)))
    return table


def _columns(site: SiteStability, detail: int) -> list[tuple[str, str]]:
    """The cells of a site behind its name, each under its heading."""
    so_far, behind = (
        (site.composite_forward, site.composite_backward),
        (site.remainder_forward, site.remainder_backward),
    )
    entering = site.entering
    places = [("cos", _cosine(entering.similarity)), ("rank", f"{entering.effective_rank:.2f}")]
    if detail == 0:
        return [("so far ↑", _gain(so_far[0])), ("to the end ↓", _gain(behind[1])), *places]
    gains = [("so far ↑", so_far[0]), ("↓", so_far[1]), ("to the end ↑", behind[0]), ("↓", behind[1])]
    if detail == 1:
        return [*_gains(gains), ("off", _error(max(site.row_error, site.column_error))), *places]
    gains += [("site ↑", site.forward), ("↓", site.backward)]
    errors = [("off ↑", _error(site.row_error)), ("↓", _error(site.column_error))]
    return [*_gains(gains), *errors, *places, ("pre", _means(site.pre)), ("post", _means(site.post))]


def _gains(gains: list[tuple[str, float]]) -> list[tuple[str, str]]:
    return [(name, _gain(value)) for name, value in gains]


def _gain(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:.1e}"


def _cosine(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"  # no minus before a zero


def _error(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def _means(weights: Weights | None) -> str:
    if weights is None:
        return ""
    return " ".join(f"{value:.2f}".removeprefix("0") for value in weights.mean)
