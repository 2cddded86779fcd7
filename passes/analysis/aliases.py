"""Alias analysis: which values of a graph share memory, and which operations write into it.

A tracer's example values share storage exactly where the model's tensors do (views, results of
in-place operations, a `to` that had nothing to do), so storages answer the question, not a list of
view operations.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch

from mhc_compile._torch import storage_key
from mhc_compile.passes.analysis.op_info import example_value, written_operands

if TYPE_CHECKING:
    from torch.fx import Graph, Node


class Aliases:
    """The aliases of a graph whose nodes carry example values. Valid until the graph changes."""

    def __init__(self, graph: Graph) -> None:
        self.order = {node: position for position, node in enumerate(graph.nodes)}
        self._members: dict[int, list[Node]] = defaultdict(list)
        self._writers: dict[int, list[Node]] = defaultdict(list)
        self._unknown: dict[Node, Node] = {}
        for node in graph.nodes:
            for key in storages(node) if node.op != "output" else ():
                self._members[key].append(node)
            for operand in written_operands(node):
                keys = storages(operand)
                for key in keys:
                    self._writers[key].append(node)
                if not keys:
                    self._unknown.setdefault(operand, node)

    def of(self, node: Node) -> list[Node]:
        """Return the nodes that share memory with `node`, itself included, in graph order."""
        return list(dict.fromkeys(member for key in storages(node) for member in self._members[key])) or [node]

    def writers(self, node: Node) -> list[Node]:
        """Return the operations that write into the memory of `node`, in graph order."""
        if not self._writers and not self._unknown:
            return []
        found = [writer for key in storages(node) for writer in self._writers[key]]
        if node in self._unknown:
            found.append(self._unknown[node])
        return sorted(set(found), key=self.order.__getitem__)

    def rename(self, old: Node, new: Node) -> None:
        """Record that `new` replaced `old` in the graph and has the same memory."""
        self.order[new] = self.order[old]
        for key in storages(new):
            self._members[key] = [*dict.fromkeys(new if member is old else member for member in self._members[key])]

    def written_after(self, node: Node, position: int) -> Node | None:
        """Return the first write into the memory of `node` after `position`, or None."""
        return next((writer for writer in self.writers(node) if self.order[writer] > position), None)


def storages(node: Node) -> tuple[int, ...]:
    """Return the storages of a node's value: several for a tuple, none if unknown."""
    value = example_value(node)
    values = value if isinstance(value, (tuple, list)) else (value,)
    keys = (storage_key(part) for part in values if isinstance(part, torch.Tensor))
    return tuple(dict.fromkeys(key for key in keys if key is not None))
