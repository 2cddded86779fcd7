"""The boundary of a part of a model: where streams may enter and leave its graph.

Dynamo cuts a model into several graphs at a graph break, and every block is its own graph where
blocks are compiled one by one. A chain then runs through several graphs: its streams leave one
graph as an additional result, together with the value that they stand for, and enter the next as an
additional input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping  # noqa: TC003 - fields of a dataclass
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch.fx import Graph, Node  # noqa: TC002 - fields of a dataclass

from mhc_compile.passes.analysis.op_info import tensor_value
from mhc_compile.passes.lifting.trunk_path import TrunkPath, trunk_path_between
from mhc_compile.passes.planning.verdict import Site  # noqa: TC001 - fields of a dataclass

if TYPE_CHECKING:
    from mhc_compile.passes.analysis.aliases import Aliases
    from mhc_compile.passes.analysis.provenance import ModuleRef

#: The keys of `Node.meta` of a graph input that receives streams, and of the output of a graph that
#: returns streams.
ARRIVAL = "mhc_arrival"
DEPARTURES = "mhc_departures"


@dataclass(frozen=True)
class BranchTail:
    """A residual add whose branch began elsewhere: owner, name, and the trunk's feature axis (< 0).

    The name is that of the module in which the other graphs had the last product with weights; None
    where they had none.
    """

    owner: ModuleRef
    name: str | None
    axis: int
    #: See `Site.heads`.
    heads: tuple[Any, ...] = ()


@dataclass(frozen=True)
class BoundaryInfo:
    """What is known of the graphs around a graph. By default it is a whole model."""

    #: Whether the graph ends at a graph break, or begins after one.
    part: bool = False
    #: Graph inputs whose streams may arrive: floating-point tensors that are no weights.
    inputs: frozenset[Node] = frozenset()
    #: Those whose example value has streams at this moment, with their feature axis, counted from
    #: the end.
    arriving: Mapping[Node, int] = field(default_factory=dict)
    #: Whether a site has hyper-connections from an earlier trace or from `attach`.
    attached: Callable[[Site], bool] = lambda _: False
    #: The tail of a branch, why its branch is lost, or None if it is no tail; given the sum, its
    #: term that is an input, the inputs that each other term comes from, and whether this graph has
    #: a product with weights on the way.
    tail: Callable[[Node, Node, tuple[tuple[Node, ...], ...], bool], BranchTail | str | None] = lambda *_: None

    def axis(self, node: Node) -> int | None:
        """Return the feature axis of the streams that arrive at `node`, or None."""
        value = tensor_value(node)
        return self.arriving[node] + value.dim() if node in self.arriving and value is not None else None


@dataclass(frozen=True)
class StreamInput:
    """Streams that enter a graph: the input `target` [..., n, C].

    Their mean is the input `value`, with features on `axis` (< 0).
    """

    target: str
    value: str
    axis: int
    streams: int
    path: str


@dataclass(frozen=True)
class BranchInput:
    """A coefficient of a branch that began in another graph.

    It is the input `target`, post [..., n] or res [..., n, n].
    """

    target: str
    value: str
    axis: int
    streams: int
    #: Name of the site below its owner.
    name: str
    kind: str


@dataclass(frozen=True)
class StreamOutput:
    """Streams that leave: result number `streams`, for result `value` with features on `axis` < 0.

    `mean`: whether the value is their mean, and not what a trunk operation makes of the mean.
    """

    value: int
    streams: int
    axis: int
    path: str
    mean: bool


@dataclass(frozen=True)
class BranchOutput:
    """A branch that ends in another graph: results `post` and `res` are its coefficients.

    Its trunk value is result number `result`, or else the input `value` with streams `arrival`.
    """

    value: str | None
    result: int | None
    arrival: str | None
    post: int
    res: int
    axis: int
    name: str


def departures(graph: Graph, last: Site, *, far: bool, aliases: Aliases) -> tuple[TrunkPath, ...]:
    """Return the paths from `last` to the results of `graph` at which its chain may continue.

    These are the sum itself, or else, where `far`, what trunk operations make of it: a block that
    ends with a norm returns normed streams.
    """
    results = [node for node in dict.fromkeys(graph.output_node().all_input_nodes) if node.op != "placeholder"]
    if last.add in results:
        return (TrunkPath.empty(last.add, last.axis),) if not aliases.writers(last.add) else ()
    if not far:
        return ()
    found = (
        trunk_path_between(last.add, node, last.axis, aliases)
        for node in results
        if aliases.order[node] > aliases.order[last.add] and not aliases.writers(node)
    )
    return tuple(path for path in found if isinstance(path, TrunkPath))


def crossings(graph: Graph) -> tuple[tuple[StreamInput | BranchInput, ...], tuple[StreamOutput | BranchOutput, ...]]:
    """Return what an expanded graph takes and returns beyond Dynamo's inputs and results."""
    arrivals = tuple(node.meta[ARRIVAL] for node in graph.find_nodes(op="placeholder") if ARRIVAL in node.meta)
    return arrivals, graph.output_node().meta.get(DEPARTURES, ())
