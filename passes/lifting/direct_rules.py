"""Rules that write the same operation for streams, with axes and sizes adapted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mhc_compile.passes.analysis.feature_axis import argument, carry_axis, permutation
from mhc_compile.passes.analysis.op_info import known_tensor, leaf_module, op_name, tensor_value
from mhc_compile.passes.lifting.trunk_op import Rule, TrunkOp

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.fx import Graph, Node

#: One operand, value by value, in any layout. Further arguments are numbers and dtypes.
_UNARY = frozenset(
    "relu relu6 gelu silu mish elu celu selu leaky_relu hardswish hardsigmoid hardtanh softplus softsign sigmoid tanh clamp clamp_min clamp_max neg"
    " abs square sqrt rsqrt exp log pow __pow__ reciprocal to _to_copy float half bfloat16 double type contiguous clone".split()
)
#: Two operands, value by value; the second a number, a vector of C, or a tensor with the trunk's
#: axes.
_BINARY = frozenset("add sub mul div truediv __mul__ __rmul__ __truediv__ __sub__ maximum minimum".split())
_NORMS = frozenset({"layer_norm", "rms_norm"})
#: Reductions over the feature axis, as a norm written by hand has them.
_REDUCTIONS = frozenset({"mean", "var", "sum"})
#: Reshapes whose sizes can be rewritten.
_SIZED = frozenset({"view", "reshape", "flatten", "_unsafe_view"})
#: Activations as leaf modules of a symbolically traced graph.
_UNARY_MODULES = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.CELU, nn.SELU, nn.LeakyReLU, nn.Hardswish, nn.Hardsigmoid,
    nn.Hardtanh, nn.Softplus, nn.Softsign, nn.Sigmoid, nn.Tanh,
)  # fmt: skip


class AsWritten(Rule):
    """Operations that act on streams [..., n, C] as they act on the trunk.

    before: y = layer_norm(x, (C,))                    after: ys = layer_norm(streams, (C,))
    before: y = x * gate        [B, 1, C]              after: ys = streams * gate.unsqueeze(-2)
    """

    def axis(self, op: TrunkOp) -> int | None:
        name, module, axis = op_name(op.node), leaf_module(op.node), op.axis
        if len({op.axes[operand] for operand in op.operands}) != 1:
            return None
        unary = name in _UNARY or isinstance(module, _UNARY_MODULES)
        norm = name in _NORMS or isinstance(module, (nn.LayerNorm, nn.RMSNorm))
        shape: Any = getattr(module, "normalized_shape", None) or argument(op.node, 1, "normalized_shape")
        over_last = norm and isinstance(shape, (tuple, list)) and len(shape) == 1
        rank = op.value.dim()
        fits = (
            (unary and not op.others and op.value.shape == op.before.shape)
            or (
                name in _BINARY
                and rank == op.before.dim()
                and all(_broadcasts(other, rank, op.last) for other in op.others)
            )
            or (op.last and over_last)
            or (op.last and name in _REDUCTIONS and _keeps_last(op.node, op.before.dim()))
        )
        return axis if fits else None

    def emit(self, graph: Graph, op: TrunkOp, lifted: Mapping[Node, Node], before: Node) -> Node:
        def operand(argument: Node) -> Node:
            if argument in lifted:
                return lifted[argument]
            value = tensor_value(argument)
            if value is None or value.dim() < 2:
                return argument
            at = op.axis
            wide = argument if at == value.dim() - 1 else graph.call_method("movedim", (argument, at, -1))
            return graph.call_method("unsqueeze", (wide, -2))

        with graph.inserting_before(before):
            copy = graph.node_copy(op.node, operand)
        copy.meta = {}
        # Streams have one axis more than the memory format of the trunk is made for.
        kept = torch.contiguous_format if op_name(op.node) == "contiguous" else torch.preserve_format
        copy.args = tuple(kept if isinstance(each, torch.memory_format) else each for each in copy.args)
        copy.kwargs = {k: kept if isinstance(each, torch.memory_format) else each for k, each in copy.kwargs.items()}
        # the same axis, counted from the end: [..., n, C] has one axis more
        if op_name(op.node) in _REDUCTIONS:
            copy.args = (copy.args[0], -1, *copy.args[2:])
            copy.kwargs = {key: value for key, value in copy.kwargs.items() if key != "dim"}
        return copy


class Permuted(Rule):
    """Permutations, with the token axes renumbered.

    before: y = x.permute(0, 2, 1)
    after:  ys = streams (only the feature axis moved)
    """

    def axis(self, op: TrunkOp) -> int | None:
        if len(op.node.all_input_nodes) != 1 or permutation(op.node, op.before.dim()) is None:
            return None
        return carry_axis(op.node, op.operands[0], op.axis)

    def emit(self, graph: Graph, op: TrunkOp, lifted: Mapping[Node, Node], before: Node) -> Node:
        order = permutation(op.node, op.before.dim())
        assert order is not None
        rank = len(order)
        tokens = [source for source in range(rank) if source != op.axis]
        moved = [tokens.index(source) for source in order if source != op.axis]
        with graph.inserting_before(before):
            return graph.call_method("permute", (lifted[op.operands[0]], *moved, rank - 1, rank))


class Reshaped(Rule):
    """Reshapes of the token axes.

    before: y = x.reshape(-1, C)                       after: ys = streams.reshape(-1, n, C)
    """

    def axis(self, op: TrunkOp) -> int | None:
        fits = (
            op_name(op.node) in _SIZED
            and op.last
            and op.value.dim() >= 2
            and op.value.shape[-1] == op.before.shape[-1]
            and op.value.dtype == op.before.dtype
        )
        return op.value.dim() - 1 if fits else None

    def emit(self, graph: Graph, op: TrunkOp, lifted: Mapping[Node, Node], before: Node) -> Node:
        streams = lifted[op.operands[0]]
        given = op.node.args[1:]
        sizes: Sequence[Any] = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
        with graph.inserting_before(before):
            if op_name(op.node) == "flatten":
                # Token axes first..last become one; reshape finds its size.
                rank = op.before.dim()
                first = int(argument(op.node, 1, "start_dim", 0)) % rank
                last = int(argument(op.node, 2, "end_dim", -1)) % rank
                kept = [*range(first), -1, *range(last + 1, rank)]
                sizes = [-1 if axis == -1 else graph.call_method("size", (streams, axis)) for axis in kept]
            shape = (*sizes[:-1], int(known_tensor(streams).shape[-2]), int(op.value.shape[-1]))
            return graph.call_method("reshape", (streams, *shape))


class GroupNorm(Rule):
    """Group norm of features on axis 1, with the statistics of each sample and stream.

    before: y = group_norm(x, groups, w, b)
    after:  flat = streams [N, ..., n, C] as [N n, C, ...]
            ys = group_norm(flat, groups, w, b) as [N, ..., n, C]
    """

    def axis(self, op: TrunkOp) -> int | None:
        norm = op_name(op.node) == "group_norm" or isinstance(leaf_module(op.node), nn.GroupNorm)
        return 1 if norm and op.axis == 1 and op.node.args[:1] == op.operands else None

    def emit(self, graph: Graph, op: TrunkOp, lifted: Mapping[Node, Node], before: Node) -> Node:
        streams = lifted[op.operands[0]]
        with graph.inserting_before(before):
            wide = graph.call_method("movedim", (streams, (-2, -1), (1, 2)))
            flat = graph.call_method("flatten", (wide, 0, 1))
            norm = graph.node_copy(op.node, lambda operand: flat if operand in lifted else operand)
            norm.meta = {}
            split = graph.call_method("unflatten", (norm, 0, (-1, int(known_tensor(streams).shape[-2]))))
            return graph.call_method("movedim", (split, (1, 2), (-2, -1)))


def _broadcasts(other: Node, rank: int, last: bool) -> bool:
    value = tensor_value(other)
    return value is not None and (value.dim() in {0, rank} or (last and value.dim() == 1))


def _keeps_last(node: Node, rank: int) -> bool:
    dims, kept = argument(node, 1, "dim"), argument(node, 2, "keepdim", False)
    single = dims[0] if isinstance(dims, (tuple, list)) and len(dims) == 1 else dims
    return kept is True and isinstance(single, int) and single % rank == rank - 1
