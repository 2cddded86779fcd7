"""Write the trunk operations of a chain for streams."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mhc_compile.passes.analysis.op_info import runs_once
from mhc_compile.passes.lifting.rules import lift, lifted_axis
from mhc_compile.passes.lifting.trunk_op import Obstacle
from mhc_compile.passes.transforms.boundary_builder import BoundaryBuilder

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.fx import Graph, Node

    from mhc_compile.passes.lifting.trunk_path import TrunkPath
    from mhc_compile.passes.planning.plan import BranchHead
    from mhc_compile.passes.transforms.stream_builder import Binding


class PathBuilder(BoundaryBuilder):
    """Writes trunk paths for streams. `sums` are the residual adds of all chains."""

    def __init__(
        self,
        graph: Graph,
        nodes: dict[Node, Node],
        openings: Mapping[BranchHead, tuple[str, Binding]],
        *,
        sums: set[Node],
    ) -> None:
        super().__init__(graph, nodes, openings)
        self.sums = sums
        #: Trunk values of the current chain: their streams, and the plain value's feature axis.
        self.known: dict[Node, tuple[Node, int]] = {}

    def _lift(self, trunk_path: TrunkPath, streams: Node) -> dict[Node, Node]:
        """Return the streams that stand for the path's values, by the nodes of the plan."""
        lifted = {trunk_path.source: streams}
        self.known[trunk_path.source] = streams, trunk_path.axes[trunk_path.source]
        for node in trunk_path.nodes:
            old = self.nodes[node]
            self._follow(old, like=old)
            # The operands may have been replaced by what another chain made of them.
            operands = self._operands(node)
            given = {new: lifted[before] for before, new in operands if before in lifted}
            axes = {new: trunk_path.axes[before] for before, new in operands if before in lifted}
            axes[old] = trunk_path.axes[node]
            older = {new: known for before, new in operands if new not in given and (known := self._known(before))}
            wide = {**axes, **{new: axis for new, (_, axis) in older.items()}}
            if older and lifted_axis(old, [*given, *older], wide) == axes[old]:
                given |= {new: older_streams for new, (older_streams, _) in older.items()}
                axes = wide
            lifted[node] = self._emit_lifted(old, given, axes)
            self.known[node] = lifted[node], trunk_path.axes[node]
        return lifted

    def _known(self, node: Node) -> tuple[Node, int] | None:
        """Return the streams and feature axis of an older trunk value, for a long skip.

        before: x3 = x2 + w * x0                           after: S3 = S2 + w * S0
        """
        if node in self.known:
            return self.known[node]
        # the sum of another chain is read as that chain gives it: as the mean of its streams
        if node in self.sums:
            return None
        behind = [operand for operand in node.all_input_nodes if operand in self.known]
        if len(behind) != 1 or node.op == "placeholder":
            return None
        axes = {behind[0]: self.known[behind[0]][1]}
        axis = lifted_axis(node, behind, axes)
        if isinstance(axis, Obstacle) or runs_once(node):
            return None
        old = self.nodes[node]
        given = {new: self.known[before][0] for before, new in self._operands(node) if before in self.known}
        new = self._emit_lifted(old, given, {**dict.fromkeys(given, axes[behind[0]]), old: axis})
        self.known[node] = new, axis
        return self.known[node]

    def _emit_lifted(self, old: Node, given: dict[Node, Node], axes: dict[Node, int]) -> Node:
        new = lift(self.graph, old, given, axes, self.cursor.next)
        while self.cursor is not new:
            self._finish(self.cursor.next)
        return new

    def _operands(self, node: Node) -> list[tuple[Node, Node]]:
        """Return the operands of a node of the plan, each with its current replacement."""
        given: list[Node] = []
        now: list[Node] = []
        torch.fx.map_arg((node.args, node.kwargs), given.append)
        torch.fx.map_arg((self.nodes[node].args, self.nodes[node].kwargs), now.append)
        return list(zip(given, now, strict=True))
