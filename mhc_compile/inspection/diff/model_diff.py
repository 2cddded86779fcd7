"""The difference that the rewrite makes to a model, as data."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mhc_compile.inspection.diff.rows import Change, Row

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mhc_compile.config.options import ResolvedOptions
    from mhc_compile.inspection.explain.results import ChainReport, RejectionReport

__all__ = ["SCHEMA", "GraphDiff", "ModelDiff"]

#: Changes when a field of `ModelDiff.to_dict` changes its meaning or goes away.
SCHEMA = "mhc-compile/diff/1"


@dataclass(frozen=True)
class GraphDiff:
    """One graph before and after.

    Attributes:
        modules: paths of the modules that run it; one, or several blocks that are alike. ("",) is the model itself.
        rows: its nodes, aligned.
        chains: what the plan rewrites.
        rejections: what it leaves alone.
    """

    modules: tuple[str, ...]
    rows: tuple[Row, ...]
    chains: tuple[ChainReport, ...]
    rejections: tuple[RejectionReport, ...]

    @property
    def changes(self) -> Counter[Change]:
        """How many rows there are of each kind."""
        return Counter(row.change for row in self.rows)


@dataclass(frozen=True)
class ModelDiff:
    """What `mhc_compile.diff` returns. Print it with rich, look at it in a notebook, or read the fields.

    Attributes:
        model: class name.
        options: the options it was made for.
        before: name of the earlier stage: "capture" or a later one.
        after: name of the later stage.
        graphs: one for every graph that Dynamo makes of the model, in the order in which they run.
    """

    model: str
    options: ResolvedOptions
    before: str
    after: str
    graphs: tuple[GraphDiff, ...]

    @property
    def changes(self) -> Counter[Change]:
        """How many rows there are of each kind, in all graphs."""
        return sum((graph.changes for graph in self.graphs), Counter())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON.

        {schema, model, options: {name: value}, stage: {before, after}, changes: {word: number}, graphs: [{modules, chains, rejections,
        before: [node], after: [node], rows: [{change, before, after}]}]}

        A node is a `NodeView` and its `text`; the `before` and `after` of a row are places in those lists, or null. Chains and rejections are those
        of `explain`.
        """
        return {
            "schema": SCHEMA,
            "model": self.model,
            "options": self.options.to_dict(),
            "stage": {"before": self.before, "after": self.after},
            "changes": _words(self.changes),
            "graphs": [_graph(graph) for graph in self.graphs],
        }

    def to_html(self) -> str:
        """One self-contained page: both graphs side by side, with search and the list of sites. It needs no server and no network."""
        from mhc_compile.inspection.diff.page import render_page

        return render_page(self)

    def to_svg(self) -> str:
        """A drawing of the residual trunk before, and of its streams after."""
        from mhc_compile.inspection.diff.drawing import to_svg

        return to_svg(self)

    def to_dot(self) -> str:
        """The same drawing for Graphviz."""
        from mhc_compile.inspection.diff.drawing import to_dot

        return to_dot(self)

    def to_mermaid(self) -> str:
        """The same drawing for Markdown."""
        from mhc_compile.inspection.diff.drawing import to_mermaid

        return to_mermaid(self)

    def _repr_html_(self) -> str:
        from mhc_compile.reporting.html import html_of

        return html_of(self)

    def __rich__(self) -> RenderableType:
        from mhc_compile.inspection.diff.text import render

        return render(self)


def _words(changes: Counter[Change]) -> dict[str, int]:
    return {change.value: changes[change] for change in Change if changes[change]}


def _graph(graph: GraphDiff) -> dict[str, Any]:
    sides: dict[str, list[dict[str, Any]]] = {"before": [], "after": []}
    rows = []
    for row in graph.rows:
        places: dict[str, int | None] = {"before": None, "after": None}
        for side, node in (("before", row.before), ("after", row.after)):
            if node is not None:
                places[side] = len(sides[side])
                sides[side].append({**asdict(node), "text": str(node)})
        rows.append({"change": row.change.value, **places})
    return {
        "modules": list(graph.modules),
        "chains": [asdict(chain) for chain in graph.chains],
        "rejections": [asdict(rejection) for rejection in graph.rejections],
        **sides,
        "rows": rows,
    }
