"""Terminal rendering of a `Stability`: for every chain a table with a row for each site."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from mhc_compile.inspection.stream_stats.results import Stability
from mhc_compile.reporting.base import counted, render

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

    from mhc_compile.inspection.stream_stats.results import ChainStability, SiteStability, Weights

#: Columns of a site: all; without single sites and weights; only the gains of the chain.
_DETAILS = (2, 1, 0)

_LEGEND = (
    "Amax, averaged over tokens: ↑ largest absolute row sum, which a signal can grow by, ↓ column sum, which a gradient"
    " can grow by; 1 is neither growth nor decay. So far: of the product of H_res from the chain's start; to the end:"
    " from the site on. Off: the largest deviation of a row or column sum from 1. Of the streams at the site's entry:"
    " cos, the mean cosine of two; rank, their effective rank."
)


@render.register(Stability)
def _stability(result: Stability) -> RenderableType:
    """Render every chain, the legend of the columns, and the remarks."""
    chains = f"{len(result.sites)} sites in {counted(len(result.chains), 'chain')}"
    conditions = f", {result.mode}, {result.dtype or 'nothing ran on streams'}, {chains}"
    parts: list[RenderableType] = [Text.assemble((f"{result.model}: residual mixing over depth", "bold"), conditions)]
    for number, chain in enumerate(result.chains, start=1):
        parts += [Text(), _chain_line(chain, f"chain {number}: " if len(result.chains) > 1 else ""), _Sites(chain)]
    parts += [Text(), Text(_LEGEND, style="dim"), *[Text()] * bool(result.remarks)]
    parts += [Text(f"{remark}.", style="yellow") for remark in result.remarks]
    return Group(*parts)


class _Sites:
    """The table of a chain, with as many columns as fit the terminal."""

    def __init__(self, chain: ChainStability) -> None:
        self._chain = chain

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        tables = [self._table(detail) for detail in _DETAILS]
        room, boundless = options.max_width, options.update_width(10_000)
        yield next((one for one in tables if Measurement.get(console, boundless, one).maximum <= room), tables[-1])

    def _table(self, detail: int) -> Table:
        rows = [_columns(site, detail) for site in self._chain.sites]
        columns = (Column(name, justify="right", no_wrap=True) for name, _ in rows[0])
        table = Table(Column("site", overflow="fold"), *columns, box=None, padding=(0, 1, 0, 0), header_style="dim")
        for site, row in zip(self._chain.sites, rows, strict=True):
            table.add_row(site.name, *(cell for _, cell in row))
        return table


def _chain_line(chain: ChainStability, name: str) -> Text:
    leaving = chain.leaving
    return Text.assemble(
        (name, "cyan"),
        f"{len(chain.sites)} sites, {chain.streams} streams of {chain.width}, {chain.sites[0].tokens} tokens; largest gain ",
        (f"{_gain(chain.amax_forward)} forward, {_gain(chain.amax_backward)} backward", "bold"),
        f"; streams leave with cosine {_cosine(leaving.similarity)}, rank {leaving.effective_rank:.2f}",
    )


def _columns(site: SiteStability, detail: int) -> list[tuple[str, str]]:
    """Return the cells of a site after its name, each with its heading."""
    entering = site.entering
    places = [("cos", _cosine(entering.similarity)), ("rank", f"{entering.effective_rank:.2f}")]
    if detail == 0:
        return [("so far ↑", _gain(site.composite_forward)), ("to the end ↓", _gain(site.remainder_backward)), *places]
    gains = [("so far ↑", _gain(site.composite_forward)), ("↓", _gain(site.composite_backward))]
    gains += [("to the end ↑", _gain(site.remainder_forward)), ("↓", _gain(site.remainder_backward))]
    if detail == 1:
        return [*gains, ("off", _error(max(site.row_error, site.column_error))), *places]
    gains += [("site ↑", _gain(site.forward)), ("↓", _gain(site.backward))]
    errors = [("off ↑", _error(site.row_error)), ("↓", _error(site.column_error))]
    return [*gains, *errors, *places, ("pre", _means(site.pre)), ("post", _means(site.post))]


def _gain(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:.1e}"


def _cosine(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"  # no minus before a zero


def _error(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def _means(weights: Weights | None) -> str:
    return " ".join(f"{value:.2f}".removeprefix("0") for value in weights.mean) if weights is not None else ""
