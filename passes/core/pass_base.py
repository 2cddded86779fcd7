"""The base class of passes, and the function that runs them."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Graph, Node

from mhc_compile._torch import copy_node, new_graph_like, trace_artifact

log = logging.getLogger(__name__)

#: Called after every pass with the pass, the graph before it and the graph after it.
Hook = Callable[["Pass", Graph, Graph], None]


@dataclass(frozen=True)
class Pass(ABC):
    """One rewrite, as a value: a valid graph in, a valid graph out. Its fields are its options.

    A subclass shows the graph before and after in its docstring. The input graph is never mutated.
    """

    #: In kebab-case.
    name: ClassVar[str]

    @abstractmethod
    def apply(self, graph: Graph) -> Graph:
        """Return a new graph, or the same graph object where nothing changes."""


def copy_graph(graph: Graph) -> tuple[Graph, dict[Node, Node]]:
    """Return a copy of `graph`, and the map from old to new nodes. `meta` is copied shallowly."""
    copy = new_graph_like(graph)
    nodes: dict[Node, Node] = {}
    for node in graph.nodes:
        nodes[node] = copy_node(copy, node, nodes)
    copy.owning_module = graph.owning_module
    return copy, nodes


def run_passes(graph: Graph, passes: Iterable[Pass], hook: Hook | None = None) -> Graph:
    """Run `passes` in order, linting after each that changes something.

    Every pass is logged (`TORCH_LOGS="+mhc_compile"`), and its graphs go to torch's structured
    trace (`TORCH_TRACE`).

    Args:
        graph: the graph to rewrite; it is not mutated.
        passes: the passes.
        hook: an additional observer.
    """
    for step in passes:
        started = time.perf_counter()
        after = step.apply(graph)
        if after is not graph:
            after.lint()
        _report(step, graph, after, time.perf_counter() - started)
        if hook is not None:
            hook(step, graph, after)
        graph = after
    return graph


def _report(step: Pass, before: Graph, after: Graph, seconds: float) -> None:
    """Log one pass, and write its graphs to torch's structured trace if there is one."""
    changed = after is not before
    log.debug(
        "pass %s: %d nodes before, %d after, %.1f ms%s",
        step.name,
        len(before.nodes),
        len(after.nodes),
        seconds * 1e3,
        "" if changed else " (unchanged)",
    )
    if changed:
        trace_artifact(f"mhc_{step.name}_before", lambda: _code(before))
        trace_artifact(f"mhc_{step.name}_after", lambda: _code(after))


def _code(graph: Graph) -> str:
    """Return the graph as Python code with the shapes of its values."""
    return graph.python_code("self", verbose=True).src
