"""Where the feature axis goes between the last contraction of a branch and the add."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mhc_compile.passes.roles import is_convolution, op_name, tensor_value

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.fx import Node

__all__ = ["feature_axis"]


def feature_axis(anchor: Node, term: Node, ordered: Iterable[Node]) -> int | None:
    """Axis of `term` that holds the features which `anchor` produced, None if the views in between lose it.

    `ordered` are the nodes of the branch in graph order. Features leave a convolution on axis 1 and every other contraction on the last one.
    """
    value = tensor_value(anchor)
    if (
        value is None
    ):  # attention returns (output, weights); getitem gives the tensor back, and its features are last as well
        axes: dict[Node, int | None] = {anchor: -1}
    else:
        axes = {anchor: 1 if is_convolution(anchor) else value.dim() - 1}
    for node in ordered:
        if node is anchor or node in axes:
            continue
        operand = next((source for source in node.all_input_nodes if source in axes), None)
        if operand is not None:
            axes[node] = _carry(node, operand, axes[operand])
    return axes.get(term)


def _carry(node: Node, operand: Node, axis: int | None) -> int | None:
    before, after = tensor_value(operand), tensor_value(node)
    if after is None or axis is None:
        return axis if axis == -1 else None
    if before is None:
        return after.dim() - 1
    rank, name = before.dim(), op_name(node)
    if name in {"transpose", "swapaxes"}:
        first, second = (_axis(node.args[1], rank), _axis(node.args[2], rank))
        return {first: second, second: first}.get(axis, axis)
    if name == "permute":
        order = node.args[1] if isinstance(node.args[1], (tuple, list)) else node.args[1:]
        return [_axis(entry, rank) for entry in order].index(axis)
    if name in {"t", "T", "mT"}:
        return {rank - 1: rank - 2, rank - 2: rank - 1}.get(axis, axis)
    if after.shape == before.shape:
        return axis
    if name in {"view", "reshape", "flatten", "unflatten", "view_as", "reshape_as"}:
        # The last axis stays the last: split into heads, merged from heads, or untouched.
        return after.dim() - 1 if axis == rank - 1 else None
    return axis if after.dim() == rank else None


def _axis(entry: Any, rank: int) -> int:
    return int(entry) % rank
