"""Which axis of a trunk holds the features.

Streams are kept as [..., n, C], so a pass must know which axis is C: the last one in a transformer,
axis 1 in a convolutional network. Shapes do not tell ([2, 16, 16] may be either); the branch does,
by the way it reads the trunk (`entry_axis`), or else by the way its last contraction leaves the
features (`exit_axis`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from mhc_compile.passes.analysis.dependence import closure
from mhc_compile.passes.analysis.op_info import (
    is_attention,
    is_contraction,
    is_convolution,
    is_recurrence,
    leaf_module,
    op_name,
    tensor_value,
)

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Sequence

    from torch import Tensor
    from torch.fx import Node

_LAYER_NORMS = frozenset({"layer_norm", "rms_norm", "native_layer_norm", "fused_layer_norm", "_fused_rms_norm"})
_CHANNEL_NORMS = frozenset(
    "batch_norm instance_norm group_norm native_batch_norm native_group_norm _native_batch_norm_legit"
    " _native_batch_norm_legit_functional _native_batch_norm_legit_no_training".split()
)
_CHANNEL_NORM_MODULES = (
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm,
)  # fmt: skip
_REDUCTIONS = frozenset({"mean", "var", "std", "norm", "var_mean", "std_mean", "vector_norm"})
RESHAPES = frozenset({"view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "_unsafe_view"})
#: Products whose first operand is what they add.
_ADDED_FIRST = frozenset({"addmm", "addbmm", "baddbmm", "addmv"})


def entry_axis(skip: Node, branch: Sequence[Node]) -> int | None:
    """Return the axis of `skip` over which its first reader normalises or contracts, or None.

    The walk passes through operations that keep the shape (activations, casts) and through
    permutations.
    """
    value = tensor_value(skip)
    if value is None:
        return None
    # For every node reached: which axis of the skip each of its axes is.
    origin: dict[Node, tuple[int, ...]] = {skip: tuple(range(value.dim()))}
    for node in branch:
        operand = next((source for source in node.all_input_nodes if source in origin), None)
        if operand is None:
            continue
        axes = origin[operand]
        said = _reads_along(node, operand, len(axes), origin)
        if said is not None:
            return axes[said]
        order = permutation(node, len(axes))
        after, before = tensor_value(node), tensor_value(operand)
        if order is not None:
            origin[node] = tuple(axes[axis] for axis in order)
        elif after is not None and before is not None and after.shape == before.shape and op_name(node) not in RESHAPES:
            origin[node] = axes
        elif after is not None and before is not None and after.shape[-1] == before.shape[-1]:
            # Token axes were folded or split; of the axes that can be named, the last is left.
            origin[node] = (*[-1] * (after.dim() - 1), axes[-1])
    return None


def _reads_along(node: Node, operand: Node, rank: int, trunk: Container[Node]) -> int | None:
    name, module = op_name(node), leaf_module(node)
    if name in _LAYER_NORMS or isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        shape: Any = getattr(module, "normalized_shape", None) or argument(node, 1, "normalized_shape")
        return rank - 1 if isinstance(shape, (tuple, list)) and len(shape) == 1 else None
    if name in _CHANNEL_NORMS or isinstance(module, _CHANNEL_NORM_MODULES) or is_convolution(node):
        return 1
    if is_contraction(node):
        place = int(name in _ADDED_FIRST)
        first = node.args[place] if len(node.args) > place else None
        return rank - 1 if first is operand or is_attention(node) or is_recurrence(node) else None
    if name in _REDUCTIONS and _rescales(node, trunk):
        dims = argument(node, 1, "dim")
        single = dims[0] if isinstance(dims, (tuple, list)) and len(dims) == 1 else dims
        return single % rank if isinstance(single, int) else None
    return None


def _rescales(reduction: Node, trunk: Container[Node]) -> bool:
    """Return whether the result meets the values that it was computed from, as that of a norm does.

    A pooling over tokens does not: `f(x.mean(1))` says nothing about the features.
    """
    readers = closure(reduction.users, lambda node: () if is_contraction(node) else node.users)
    return any(operand in trunk for reader in readers for operand in reader.all_input_nodes)


def exit_axis(contraction: Node, term: Node, ordered: Iterable[Node]) -> int | None:
    """Return the axis of `term` that holds the features of `contraction`, None if views lose it.

    `ordered` are the nodes of the branch in graph order. Features leave a convolution on axis 1 and
    every other contraction on the last one.
    """
    value = tensor_value(contraction)
    # Attention returns (output, weights); `getitem` takes the tensor out, with its features last.
    last = -1 if value is None else value.dim() - 1
    axes: dict[Node, int | None] = {contraction: 1 if is_convolution(contraction) and value is not None else last}
    for node in ordered:
        if node in axes:
            continue
        operand = next((source for source in node.all_input_nodes if source in axes), None)
        if operand is not None:
            axes[node] = carry_axis(node, operand, axes[operand])
    return axes.get(term)


def carry_axis(node: Node, operand: Node, axis: int | None) -> int | None:
    """Return where `node` puts the axis `axis` of its operand, None if it splits or merges it."""
    before, after = tensor_value(operand), tensor_value(node)
    if after is None or axis is None:
        return axis if axis == -1 else None
    if before is None:
        return after.dim() - 1
    rank = before.dim()
    order = permutation(node, rank)
    if order is not None:
        return order.index(axis)
    if after.shape == before.shape:
        return axis
    if op_name(node) in RESHAPES:
        # The last axis stays the last: split into heads, merged from heads, or untouched.
        return after.dim() - 1 if axis == rank - 1 else whole_axis(before, after, axis)
    return axis if after.dim() == rank else None


def whole_axis(before: Tensor, after: Tensor, axis: int) -> int | None:
    """Return the axis of `after` that is the axis `axis` of `before`, neither split nor merged."""
    leading = math.prod(before.shape[:axis])
    for candidate in range(after.dim()):
        same = after.shape[candidate] == before.shape[axis] and math.prod(after.shape[:candidate]) == leading
        if statically_known_true(same):
            return candidate
    return None


def permutation(node: Node, rank: int) -> tuple[int, ...] | None:
    """Return the operand's axes in their new order, None if `node` does not permute."""
    name = op_name(node)
    if name in {"transpose", "swapaxes"}:
        first, second = (int(argument(node, i, f"dim{i - 1}")) % rank for i in (1, 2))
        order = list(range(rank))
        order[first], order[second] = second, first
        return tuple(order)
    if name == "permute":
        given = argument(node, 1, "dims")
        listed: Any = given if isinstance(given, (tuple, list)) else node.args[1:]
        return tuple(int(entry) % rank for entry in listed)
    if name in {"t", "T", "mT"}:
        return (*range(rank - 2), rank - 1, rank - 2) if name == "mT" or rank == 2 else None
    return None


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """Return an argument that is given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
