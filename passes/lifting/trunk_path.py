"""Trunk paths: the operations between two sites, or between a site's trunk and skip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mhc_compile.passes.analysis.op_info import passes_value
from mhc_compile.passes.lifting.rules import lifted_axis
from mhc_compile.passes.lifting.trunk_op import Obstacle

if TYPE_CHECKING:
    from torch.fx import Node

    from mhc_compile.passes.analysis.aliases import Aliases

#: More nodes than this are no path between two sites, but a branch.
_LONGEST = 256


@dataclass(frozen=True, eq=False)
class TrunkPath:
    """The trunk operations from `source`, a site's sum, to a later trunk value, which is the last.

    `axes` gives for every operation, and for the sum itself, the axis that holds the features.
    """

    source: Node
    nodes: tuple[Node, ...]
    axes: dict[Node, int]

    @classmethod
    def empty(cls, trunk: Node, axis: int) -> TrunkPath:
        """Return a path without operations: a chain begins at `trunk`, or goes on with it."""
        return cls(trunk, (), {trunk: axis})


def trunk_path_between(source: Node, target: Node, axis: int, aliases: Aliases) -> TrunkPath | Obstacle:
    """Return the path from `source` (features on `axis`) to `target`, or what cannot be lifted."""
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
                return Obstacle(target, f"more than {_LONGEST} operations lead to it")
            stack.extend(node.all_input_nodes)
    axes: dict[Node, int] = {source: axis}
    nodes: list[Node] = []
    for node in sorted(ancestors, key=order.__getitem__):
        operands = [operand for operand in node.all_input_nodes if operand in axes]
        if not operands or not passes_value(node):
            continue  # what takes only a shape from the trunk, or is detached, reads the mean
        carried = lifted_axis(node, operands, axes)
        if isinstance(carried, Obstacle):
            return carried
        if aliases.writers(node):
            return Obstacle(node, "it is written in place")
        axes[node] = carried
        nodes.append(node)
    if not nodes or nodes[-1] is not target:
        return Obstacle(target, f"no value of '{source}' reaches it")
    return TrunkPath(source, tuple(nodes), axes)
