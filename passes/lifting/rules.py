"""Lifting: run a trunk operation on all streams at once.

Between two sites of a chain there may be operations on the trunk itself: a norm (post-norm models),
an activation (ResNet), a cast, a view, a pooling; and between the trunk and the shortcut value of
one site a scale (DeepNorm) or a slice. Streams are [..., n, C] with the token axes in the trunk's
order, so most of these operations act on streams as they are written, and some need their axes
renumbered (`direct_rules`). Dropout draws the plain model's mask and applies it to every stream;
batch norm takes its statistics over all of them; other operations run under `torch.func.vmap` where
they can (`compound_rules`). Contractions (a projection) are expensive: they end the chain.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhc_compile.passes.analysis.op_info import is_contraction, is_inplace, is_region
from mhc_compile.passes.lifting.compound_rules import BatchNorm, Dropped, Vmapped
from mhc_compile.passes.lifting.direct_rules import AsWritten, GroupNorm, Permuted, Reshaped
from mhc_compile.passes.lifting.trunk_op import Obstacle, Rule, TrunkOp

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch.fx import Graph, Node

#: The first that applies is used. Rules that keep the graph readable come before those that trace a
#: function.
_RULES: tuple[Rule, ...] = (AsWritten(), Permuted(), Reshaped(), Dropped(), GroupNorm(), BatchNorm(), Vmapped())


def lifted_axis(node: Node, operands: Iterable[Node], axes: Mapping[Node, int]) -> int | Obstacle:
    """Return the feature axis of `node` on streams, or why it cannot run on them.

    `operands` are those on the trunk, `axes` has the feature axis of each.
    """
    op = TrunkOp.of(node, operands, axes)
    if op is None:
        return Obstacle(node, "its shape is unknown")
    if is_contraction(node) or is_region(node):
        return Obstacle(node, "a contraction ends the chain")
    if is_inplace(node):
        return Obstacle(node, "it writes in place")
    found = next((axis for rule in _RULES if (axis := rule.axis(op)) is not None), None)
    return Obstacle(node, "no rule covers it") if found is None else found


def lift(graph: Graph, node: Node, lifted: Mapping[Node, Node], axes: Mapping[Node, int], before: Node) -> Node:
    """Write `node` for streams [..., n, C] before `before`. Each rule shows what that looks like.

    `lifted` gives the streams for its operands, `axes` the feature axes of them and of `node`.
    """
    op = TrunkOp.of(node, [operand for operand in node.all_input_nodes if operand in lifted], axes)
    assert op is not None
    rule = next(rule for rule in _RULES if isinstance(rule.axis(op), int))
    return rule.emit(graph, op, lifted, before)
