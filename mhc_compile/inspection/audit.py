"""`mhc_compile.audit`: which hyper-connections of a model were computed, how often, and where."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from mhc_compile.attachment.ledger import record_of
from mhc_compile.attachment.model_tree import connections, unwrap
from mhc_compile.reporting.base import Renderable, counted, render

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import nn


@dataclass(frozen=True)
class GraphUse:
    """Compiled graphs of one frame, "file:line", with one inner backend: their number."""

    frame: str
    inner_backend: str
    graphs: int


@dataclass(frozen=True)
class SiteAudit:
    """The counts of one hyper-connection in this process. A copy of a model starts at zero.

    Attributes:
        path: its path in the model.
        computed: calls of compiled graphs that computed it.
        plain: calls of the module that declares it outside of any graph, with a plain residual add.
        computed_since: time of the first computed call, in seconds since the epoch, or None.
        last_plain: time of the last plain run, or None.
        graphs: the graphs that computed it, by frame.
    """

    path: str
    computed: int
    plain: int
    computed_since: float | None
    last_plain: float | None
    graphs: tuple[GraphUse, ...]


@dataclass(frozen=True)
class Audit(Renderable):
    """Result of `mhc_compile.audit`: class name of the model, and its sites in order.

    Print it, or read the fields.
    """

    model: str
    sites: tuple[SiteAudit, ...]

    @property
    def idle(self) -> tuple[SiteAudit, ...]:
        """The sites that no compiled graph computed."""
        return tuple(site for site in self.sites if not site.computed)

    @property
    def plain(self) -> tuple[SiteAudit, ...]:
        """The sites that ran plain at least once."""
        return tuple(site for site in self.sites if site.plain)

    @property
    def ok(self) -> bool:
        """Whether every site was computed, and none ran plain."""
        return not self.idle and not self.plain

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"schema": "mhc-compile/audit/1", "ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=110, highlight=False, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines())


def audit(model: nn.Module) -> Audit:
    """Return how often each hyper-connection of `model` was computed in this process, and where.

        compiled = torch.compile(model, backend="mhc")
        compiled(batch)
        print(mhc_compile.audit(model))

    A call of a compiled graph counts for the hyper-connections whose parameters it got, also where
    equivalent blocks share a graph, and under `mhc_compile.eager`. The counts cost a look-up for
    each site and call. They belong to the objects: a copy, and a model loaded from a file, start at
    zero. Processes that run a model in parallel count for themselves.

    Args:
        model: any module, or one that `torch.compile` returned. Without hyper-connections there are
            no sites.
    """
    sites = []
    for path, connection in connections(model).items():
        record = record_of(connection)
        uses = tuple(GraphUse(*place, number) for place, number in sorted(record.graphs.items()))
        sites.append(SiteAudit(path, record.computed, record.plain, record.computed_since, record.last_plain, uses))
    return Audit(type(unwrap(model)).__name__, tuple(sites))


@render.register(Audit)
def _audit(result: Audit) -> RenderableType:
    """Render a row for each site, then the frames of the graphs, then the verdict."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("site", overflow="fold")
    for name in ("computed", "since", "plain", "last", "graphs"):
        table.add_column(name, justify="left" if name in {"since", "last"} else "right", no_wrap=True)
    places: dict[str, int] = {}
    for site in result.sites:
        graphs = sum(use.graphs for use in site.graphs)
        cells = str(site.computed), _time(site.computed_since), str(site.plain), _time(site.last_plain), str(graphs)
        table.add_row(site.path, *cells, style="" if site.computed and not site.plain else "red")
        for use in site.graphs:
            place = f"{use.frame}, {use.inner_backend}"
            places[place] = max(places.get(place, 0), use.graphs)
    listed = [Text(f"{counted(number, 'graph')} of {place}", style="dim") for place, number in places.items()]
    return Group(
        Text(f"{result.model}: {counted(len(result.sites), 'site')}", style="bold"), table, *listed, _verdict(result)
    )


def _verdict(result: Audit) -> Text:
    if not result.sites:
        return Text("The model has no hyper-connections.", style="yellow")
    if result.ok:
        return Text("Every site was computed, and none ran plain.", style="green")
    parts = [f"{len(result.idle)} never computed"] if result.idle else []
    parts += [f"{len(result.plain)} ran plain"] if result.plain else []
    return Text(f"Of {counted(len(result.sites), 'site')}: {', '.join(parts)}.", style="bold red")


def _time(seconds: float | None) -> str:
    return datetime.fromtimestamp(seconds).isoformat(" ", "seconds") if seconds is not None else "–"
