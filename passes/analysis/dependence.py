"""Dependence analysis: which values are computed from which, for a whole graph in one sweep.

Every node carries one bit for each source that it depends on. The sweep is linear in the nodes; a
bit set is one Python integer, so a step costs a few machine words even with thousands of sources.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhc_compile.passes.analysis.aliases import storages
from mhc_compile.passes.analysis.op_info import (
    is_attention,
    is_contraction,
    is_region,
    passes_value,
    tensor_value,
    written_operands,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch.fx import Graph, Node

    from mhc_compile.passes.analysis.aliases import Aliases
    from mhc_compile.passes.analysis.provenance import Provenance


class Dependence:
    """Dependence of every node on `sources`: at all, by value, by value through a contraction.

    A value that is written in place into a tensor reaches all later readers of the tensor, by any
    of its names.
    """

    def __init__(self, graph: Graph, sources: Iterable[Node], aliases: Aliases, weights: frozenset[Node]) -> None:
        self._bits = {source: 1 << index for index, source in enumerate(dict.fromkeys(sources))}
        self._aliases = aliases
        self._anyhow: dict[Node, int] = {}
        self._value: dict[Node, int] = {}
        self._contracted: dict[Node, int] = {}
        self._twice: dict[Node, int] = {}
        written: dict[int, tuple[int, int, int]] = {}
        for node in graph.nodes:
            anyhow = value = contracted = twice = 0
            for operand in node.all_input_nodes:
                own = self._bits.get(operand, 0)
                anyhow |= self._anyhow[operand] | own
                value |= self._value[operand] | own
                contracted |= self._contracted[operand]
                twice |= self._twice[operand]
                if written:
                    for key in storages(operand):
                        more = written.get(key)
                        if more is not None:
                            anyhow, value, contracted = anyhow | more[0], value | more[1], contracted | more[2]
            if not passes_value(node):
                value = contracted = twice = 0
            elif value and contracts(node, weights):
                contracted, twice = contracted | value, twice | contracted
            self._anyhow[node], self._value[node] = anyhow, value
            self._contracted[node], self._twice[node] = contracted, twice
            for target in written_operands(node):
                for key in storages(target):
                    old = written.get(key, (0, 0, 0))
                    written[key] = (old[0] | anyhow, old[1] | value, old[2] | contracted)

    def at_all(self, source: Node, node: Node) -> bool:
        """Return whether anything flows from `source` to `node`: values, shapes, integers."""
        return bool(self._anyhow[node] & self._bits[source])

    def value(self, source: Node, node: Node) -> bool:
        """Return whether a differentiable value flows from `source` to `node`."""
        return bool(self._value[node] & self._bits[source])

    def contracted(self, source: Node, node: Node) -> bool:
        """Return whether a value flows from `source` to `node` through a contraction."""
        return bool(self._contracted[node] & self._bits[source])

    def contracted_twice(self, source: Node, node: Node) -> bool:
        """Return whether a value flows from `source` to `node` through two contractions in turn."""
        return bool(self._twice[node] & self._bits[source])

    def between(self, source: Node, terms: Iterable[Node]) -> tuple[Node, ...]:
        """Return the nodes from `source` to `terms`, the terms included, in graph order."""
        order = self._aliases.order
        # Writes that complete the source come before everything that is computed from it.
        own = set(self._aliases.writers(source))

        def before(node: Node) -> Iterator[Node]:
            for operand in node.all_input_nodes:
                writers = [w for w in self._aliases.writers(operand) if order[w] < order[node] and w not in own]
                yield from (one for one in (operand, *writers) if self.value(source, one))

        return tuple(
            sorted(closure((term for term in terms if self.value(source, term)), before), key=order.__getitem__)
        )


def closure(starts: Iterable[Node], step: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """Return `starts` and every node that repeated steps lead to."""
    reached: set[Node] = set()
    stack = list(starts)
    while stack:
        node = stack.pop()
        if node not in reached:
            reached.add(node)
            stack.extend(step(node))
    return reached


def weights_of(graph: Graph, provenance: Provenance) -> frozenset[Node]:
    """Return the weights of a graph: parameters, buffers, and values computed from them alone."""
    weights: set[Node] = set()
    for node in graph.nodes:
        if provenance.holds_weights(node):
            weights.add(node)
            continue
        floats = [
            operand
            for operand in node.all_input_nodes
            if (value := tensor_value(operand)) is not None and value.is_floating_point()
        ]
        if floats and all(operand in weights for operand in floats):
            weights.add(node)
    return frozenset(weights)


def contracts(node: Node, weights: frozenset[Node]) -> bool:
    """Return whether the node contracts with a weight or constant.

    Activation-only products (the state of a linear recurrence) do not count. Attention counts
    without weights of its own, and so does a region that the passes do not look into.
    """
    if is_attention(node) or is_region(node):
        return True
    if not is_contraction(node):
        return False
    tensors = [operand for operand in node.all_input_nodes if tensor_value(operand) is not None]
    return node.op == "call_module" or len(tensors) < 2 or any(operand in weights for operand in tensors)
