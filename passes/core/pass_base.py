"""What a pass is, and how a tuple of them runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Graph, Node

__all__ = ["Hook", "Pass", "copy_graph", "run_passes"]

#: Called after every pass with the pass, the graph before it and the graph after it: timing, tracing and diffs live here.
Hook = Callable[["Pass", Graph, Graph], None]


@dataclass(frozen=True)
class Pass(ABC):
    """One idea, as a value: a valid graph in, a valid graph out. The fields of a subclass are its options.

    The input graph is never mutated. `name` is kebab-case.
    """

    name: ClassVar[str]

    @abstractmethod
    def apply(self, graph: Graph) -> Graph:
        """A new graph. The same graph object may come back where nothing changes."""


def copy_graph(graph: Graph) -> tuple[Graph, dict[Node, Node]]:
    """A copy of `graph` with its output, and the map from old to new nodes. Node metadata is copied shallowly.

    Dynamo hangs the source of every graph input on the node itself, where a plain copy loses it; AOTAutograd asks for it later.
    """
    copy = Graph(tracer_cls=graph._tracer_cls)
    nodes: dict[Node, Node] = {}
    for node in graph.nodes:
        twin = copy.node_copy(node, lambda n: nodes[n])
        nodes[node] = twin
        if hasattr(node, "_dynamo_source"):
            twin._dynamo_source = node._dynamo_source
    copy._codegen = graph._codegen
    copy.owning_module = graph.owning_module
    return copy, nodes


def run_passes(graph: Graph, passes: Iterable[Pass], hook: Hook | None = None) -> Graph:
    """Runs `passes` in order, linting after each that changes something."""
    for step in passes:
        after = step.apply(graph)
        if after is not graph:
            after.lint()
        if hook is not None:
            hook(step, graph, after)
        graph = after
    return graph
