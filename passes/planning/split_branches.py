"""Branches that a graph break splits.

A break inside a branch puts its beginning, the head, into one graph, and its end, with the
residual add, into a later one:

    x1 = x + attn(norm1(x)); h = norm2(x1)     results x1 and h: norm2 is the head of a branch
    (the routing of experts, outside of any graph)
    out = x1 + expert_sum                      inputs x1 and expert_sum: the tail

The head reads the streams as the branch of a site does, and returns the coefficients that the tail
needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.fx import Graph, Node

from mhc_compile.passes.analysis.dependence import closure, contracts, weights_of
from mhc_compile.passes.analysis.feature_axis import entry_axis
from mhc_compile.passes.analysis.op_info import passes_value, tensor_value
from mhc_compile.passes.planning.plan import BranchHead

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mhc_compile.passes.analysis.aliases import Aliases
    from mhc_compile.passes.analysis.provenance import ModuleRef, Provenance
    from mhc_compile.passes.planning.graph_boundary import BoundaryInfo
    from mhc_compile.passes.planning.plan import Chain


def find_heads(
    graph: Graph, provenance: Provenance, chains: Iterable[Chain], edges: BoundaryInfo, aliases: Aliases
) -> tuple[BranchHead, ...]:
    """Return the heads of branches whose tails may lie in other graphs."""
    chains, results = tuple(chains), graph.output_node().args[0]
    if not (edges.inputs or edges.part) or not isinstance(results, (tuple, list)):
        return ()
    places = {node: number for number, node in reversed(list(enumerate(results))) if isinstance(node, Node)}
    taken = {
        node for chain in chains for site in chain.sites for node in (*site.branch, *site.adds, *site.shortcut.nodes)
    }
    last = {chain.sites[-1].add for chain in chains}
    weights = weights_of(graph, provenance)
    found = (
        _head(node, provenance, places, taken, aliases, weights)
        for node in graph.nodes
        if node in edges.inputs or (node in places and node in last)
    )
    return tuple(head for head in found if head is not None)


def _head(
    value: Node,
    provenance: Provenance,
    places: dict[Node, int],
    taken: set[Node],
    aliases: Aliases,
    weights: frozenset[Node],
) -> BranchHead | None:
    if aliases.writers(value):
        return None
    readers = [user for user in value.users if user.op != "output" and user not in taken and passes_value(user)]
    reached = _forward(readers, aliases)
    numbers = {
        places[node]: _last_module(node, reached, provenance, weights) for node in sorted(reached & places.keys())
    }
    readers = [reader for reader in readers if any(node in places for node in _forward([reader], aliases))]
    if not numbers or taken & reached:
        return None
    modules = [next((ref for ref in provenance.stack(reader)[1:] if ref.called), None) for reader in readers]
    tensors = [node for node in reached if (found := tensor_value(node)) is not None and found.dim() > 0]
    axis = entry_axis(value, sorted(tensors, key=aliases.order.__getitem__))
    example = tensor_value(value)
    if None in modules or axis is None or example is None or not 0 <= axis < example.dim():
        return None
    named = dict.fromkeys(ref for ref in modules if ref is not None)
    return BranchHead(value, tuple(readers), tuple(named), numbers, axis)


def _last_module(
    result: Node, reached: set[Node], provenance: Provenance, weights: frozenset[Node]
) -> ModuleRef | None:
    """Return the module of the last contraction among the nodes `reached` that lead to `result`."""
    behind = closure([result], lambda node: reached.intersection(node.all_input_nodes))
    products = sorted(node for node in behind if contracts(node, weights))
    return next((ref for ref in provenance.stack(products[-1])[1:] if ref.called), None) if products else None


def _forward(starts: Iterable[Node], aliases: Aliases) -> set[Node]:
    """Return `starts` and everything that is computed from them."""
    carries = (start for start in starts if start.op != "output" and passes_value(start))
    reached = closure(carries, lambda node: [user for user in node.users if user.op != "output" and passes_value(user)])
    return reached & aliases.order.keys()
