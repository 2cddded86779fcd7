"""Counts what was rewritten below `mhc run`, in the script and in its children."""

from __future__ import annotations

import json
import os
import weakref
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from mhc_compile.tools.launcher.messages import say_first

if TYPE_CHECKING:
    from types import CodeType

    from torch import nn

    from mhc_compile.compilation.session import GraphSession
    from mhc_compile.modules.hyper_connection import HyperConnection
    from mhc_compile.tools.launcher.order import Order

__all__ = ["Graph", "Tally", "Total"]


@dataclass(frozen=True)
class Graph:
    """One compiled graph.

    Attributes:
        pid: the process.
        model: number of the compiled model in its process, and `kind` its class, or the function where no module is.
        kind: see `model`.
        connections: how many hyper-connections were first seen in this graph.
        left_alone: how many additions more than before were left alone in this code of this model.
        form: streams and mapping of the hyper-connections, in words.
    """

    pid: int
    model: int
    kind: str
    connections: int
    left_alone: int
    form: str


@dataclass
class Total:
    """All graphs together."""

    graphs: list[Graph] = field(default_factory=list)

    @property
    def connections(self) -> int:
        """Hyper-connections."""
        return sum(graph.connections for graph in self.graphs)

    @property
    def left_alone(self) -> int:
        """Additions left alone, in models that have hyper-connections."""
        rewritten = {(graph.pid, graph.model) for graph in self.graphs if graph.connections}
        return sum(graph.left_alone for graph in self.graphs if (graph.pid, graph.model) in rewritten)

    @property
    def processes(self) -> int:
        """Processes that rewrote something."""
        return len({graph.pid for graph in self.graphs if graph.connections})

    @property
    def models(self) -> Counter[str]:
        """How many models of each class have hyper-connections."""
        rewritten = {(graph.pid, graph.model): graph.kind for graph in self.graphs if graph.connections}
        return Counter(rewritten.values())


class Tally:
    """What this process compiled with mhc. Children of the script write it down for the script as they go: many never come to their exit handlers.

    Args:
        order: who is the script, and where its children report.
    """

    def __init__(self, order: Order) -> None:
        self.order = order
        self.total = Total()
        self._connections: weakref.WeakSet[HyperConnection] = weakref.WeakSet()
        self._models: weakref.WeakKeyDictionary[nn.Module | CodeType, int] = weakref.WeakKeyDictionary()
        self._left: weakref.WeakKeyDictionary[nn.Module | CodeType, Counter[CodeType]] = weakref.WeakKeyDictionary()

    def note(self, study: GraphSession) -> None:
        """Counts one graph; see `mhc_compile._observe`."""
        from mhc_compile import _torch
        from mhc_compile.attachment.model_tree import find_connection

        code = _torch.frame_code()
        root = study.provenance.root
        model: nn.Module | CodeType = code if root is None else root
        new, form = 0, ""
        for site in study.plan.sites:
            owner = study.provenance.module(site.owner)
            connection = find_connection(owner, site) if owner is not None else None
            if connection is not None and connection not in self._connections:
                self._connections.add(connection)
                new += 1
                preset = f"preset {connection.preset}, " if connection.preset != "paper" else ""
                form = f"{preset}streams {connection.streams}, mapping {connection.mapping}"
        # A graph that is compiled again, for other shapes, has the same additions.
        left = self._left.setdefault(model, Counter())
        more = max(0, len(study.plan.rejections) - left[code])
        left[code] += more
        self._record(
            Graph(
                os.getpid(),
                self._models.setdefault(model, len(self.total.graphs)),
                f"{code.co_name}()" if root is None else type(root).__name__,
                new,
                more,
                form,
            )
        )

    def _record(self, graph: Graph) -> None:
        first = graph.connections > 0 and graph.kind not in self.total.models
        self.total.graphs.append(graph)
        if graph.pid != self.order.pid:
            with open(self.order.reports, "a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(graph)) + "\n")  # one write, behind whatever another child wrote
        if first:
            say_first(self.order, graph)

    def with_children(self) -> Total:
        """The graphs of this process and of all children that reported to it. Their reports are deleted."""
        try:
            with open(self.order.reports, encoding="utf-8") as file:
                children = [Graph(**json.loads(line)) for line in file]
            os.unlink(self.order.reports)
        except FileNotFoundError:
            children = []
        return Total([*self.total.graphs, *children])
