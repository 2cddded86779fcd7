"""The difference that the rewrite makes to a model, as data."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

from mhc_compile.reporting.base import Renderable, export

if TYPE_CHECKING:
    from mhc_compile.config.options import ResolvedOptions
    from mhc_compile.inspection.explain.results import ChainReport, RejectionReport

Operation = Literal["input", "parameter", "call", "output"]
#: "site": an add that becomes a hyper-connection. "skipped": an add that does not. "stream": a node
#: of the rewrite.
Role = Literal["", "site", "skipped", "stream"]


@dataclass(frozen=True)
class NodeView:
    """One node of a graph, without tensors or references to the model."""

    name: str  #: unique in its graph; of a parameter, its path; of an input, its name in the model's signature
    op: Operation
    target: str  #: the operation: "aten.add.Tensor", ".view", "mhc.update"; "" for inputs and the output
    template: str  #: its arguments, with {} for every operand: "{}, {}, alpha=2"
    reads: tuple[str, ...]  #: names of its operands, in the order of the template
    value: str  #: dtype and shape, "float32[2, 8, 64]"; several in parentheses; "" without a tensor
    module: str  #: path of the innermost module call that contains it; "" is the model itself
    kind: str  #: class of that module
    source: str  #: `file:line` in the model's code, "" if the tracer did not record it
    role: Role
    site: str  #: path of its hyper-connection, or ""
    reason: str  #: code of the reason why an add is skipped, or ""

    @property
    def arguments(self) -> str:
        """The arguments by name. Parameters of the node's own module lose its path: ".weight"."""
        own = f"{self.module}." if self.module else "\0"
        return self.template.format(
            *(f".{name.removeprefix(own)}" if name.startswith(own) else name for name in self.reads)
        )

    def __str__(self) -> str:
        if self.op == "output":
            return f"return {self.arguments}"
        if self.op != "call":
            return self.name
        if self.target.startswith("."):  # a method
            receiver, _, rest = self.arguments.partition(", ")
            return f"{self.name} = {receiver}{self.target}({rest})"
        return f"{self.name} = {self.target}({self.arguments})"


class Change(Enum):
    """What a stage does to a node. The value is the word that reports print."""

    #: Nothing.
    SAME = "same"
    #: Only the plan's verdict is new: the add becomes a site, or is skipped.
    MARKED = "marked"
    #: The same operation with other operands.
    REWIRED = "rewired"
    #: The same operation on streams: one more axis.
    LIFTED = "lifted"
    #: Another operation in its place: a residual add that becomes a hyper-connection.
    REPLACED = "replaced"
    REMOVED = "removed"
    ADDED = "added"


@dataclass(frozen=True)
class Row:
    """A node before and after; `before` is None if it was added, `after` if it was removed."""

    change: Change
    before: NodeView | None
    after: NodeView | None

    @property
    def node(self) -> NodeView:
        """The node after the change; of a removed one, before it."""
        node = self.after or self.before
        assert node is not None
        return node


@dataclass(frozen=True)
class GraphDiff:
    """One graph before and after."""

    modules: tuple[str, ...]  #: paths of the modules that run it; several for equivalent blocks; "" is the model
    rows: tuple[Row, ...]  #: its nodes, aligned
    chains: tuple[ChainReport, ...]  #: of the plan
    rejections: tuple[RejectionReport, ...]  #: the adds that the plan skips

    @property
    def title(self) -> str:
        """The modules in a few words: "blocks.0 and 3 blocks like it"."""
        first, count = self.modules[0] or "the model itself", len(self.modules) - 1
        return f"{first} and {count} blocks like it" if count else first

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; see `ModelDiff.to_dict`."""
        sides: dict[str, list[dict[str, Any]]] = {"before": [], "after": []}
        rows: list[dict[str, Any]] = [{"change": row.change.value, "before": None, "after": None} for row in self.rows]
        for row, entry in zip(self.rows, rows, strict=True):
            for side, nodes in sides.items():
                if (node := getattr(row, side)) is not None:
                    entry[side] = len(nodes)
                    nodes.append({**asdict(node), "text": str(node)})
        chains, rejections = ([asdict(report) for report in reports] for reports in (self.chains, self.rejections))
        return {"modules": list(self.modules), "chains": chains, "rejections": rejections, **sides, "rows": rows}


@dataclass(frozen=True)
class ModelDiff(Renderable):
    """Result of `mhc_compile.diff`. Print it with rich, show it in a notebook, or read the fields.

    Attributes:
        model: class name.
        options: the options of the rewrite.
        before: name of the earlier stage, "capture" by default.
        after: name of the later stage, "expand" by default.
        graphs: one for every graph that Dynamo captures, in the order in which they run.
    """

    model: str
    options: ResolvedOptions
    before: str
    after: str
    graphs: tuple[GraphDiff, ...]

    @property
    def changes(self) -> Counter[Change]:
        """Number of rows by kind of change, in all graphs."""
        return Counter(row.change for graph in self.graphs for row in graph.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON.

        {schema, model, options: {name: value}, stage: {before, after}, changes: {word: number},
        graphs: [{modules, chains, rejections, before: [node], after: [node],
        rows: [{change, before, after}]}]}

        A node is a `NodeView` and its `text`; `before` and `after` of a row are indices into those
        lists, or null. Chains and rejections are those of `explain`.
        """
        changes = self.changes
        return {
            "schema": "mhc-compile/diff/1",  # changes when a field changes its meaning or is removed
            "model": self.model,
            "options": self.options.to_dict(),
            "stage": {"before": self.before, "after": self.after},
            "changes": {change.value: changes[change] for change in Change if changes[change]},
            "graphs": [graph.to_dict() for graph in self.graphs],
        }

    def to_html(self) -> str:
        """Return one self-contained page: both graphs, with search and the list of sites."""
        return str(export(self, "html"))

    def to_svg(self) -> str:
        """Return a drawing of the residual trunk before, and of its streams after."""
        return str(export(self, "svg"))

    def to_dot(self) -> str:
        """Return the same drawing for Graphviz."""
        return str(export(self, "dot"))

    def to_mermaid(self) -> str:
        """Return the same drawing for Markdown."""
        return str(export(self, "mermaid"))
