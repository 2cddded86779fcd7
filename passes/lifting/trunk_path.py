"""A stretch of trunk operations: what stands between two sites of a chain, or between the trunk and the skip of one site."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhc_compile.passes.analysis.op_info import passes_value
from mhc_compile.passes.lifting.rules import lifted_axis

if TYPE_CHECKING:
    from torch.fx import Node

    from mhc_compile.passes.analysis.aliases import Aliases

__all__ = ["TrunkPath", "trunk_path_between"]

#: More nodes than this are no stretch between two sites, but a branch.
_LONGEST = 256


class TrunkPath:
    """The trunk operations between the sum of one site and the skip of the next, in graph order, the skip last.

    `axes` gives for every operation, and for the sum itself, the axis that holds the features.
    """

    def __init__(self, source: Node, nodes: tuple[Node, ...], axes: dict[Node, int]) -> None:
        self.source = source
        self.nodes = nodes
        self.axes = axes

    @classmethod
    def empty(cls, trunk: Node, axis: int) -> TrunkPath:
        """No operations: a chain begins at `trunk`, or goes on with it."""
        return cls(trunk, (), {trunk: axis})


def trunk_path_between(source: Node, target: Node, axis: int, aliases: Aliases) -> TrunkPath | None:
    """What stands between `source`, whose features lie on `axis`, and `target`; None if some of it cannot be lifted."""
    if source is target:
        return TrunkPath.empty(source, axis)
    order = aliases.order
    ancestors: set[Node] = set()
    stack = [target]
    while stack:
        node = stack.pop()
        if node not in ancestors and order[node] > order[source]:
            ancestors.add(node)
            if len(ancestors) > _LONGEST:
                return None
            stack.extend(node.all_input_nodes)
    axes: dict[Node, int] = {source: axis}
    nodes: list[Node] = []
    for node in sorted(ancestors, key=order.__getitem__):
        operands = [operand for operand in node.all_input_nodes if operand in axes]
        if not operands or not passes_value(node):
            continue  # what takes no more than a shape from the trunk, or is cut off from it, reads the mean of the streams
        carried = lifted_axis(node, operands, axes)
        if carried is None or aliases.writers(node):
            return None
        axes[node] = carried
        nodes.append(node)
    if not nodes or nodes[-1] is not target:
        return None
    return TrunkPath(source, tuple(nodes), axes)
