"""Trunk operations that run on all streams at once.

Between two sites of a chain there may be operations on the trunk itself: a norm (post-norm models), an activation (ResNet), a cast, a view. Streams
are [..., n, C] with the token axes in the order in which the trunk has them, so most of these operations act on streams as they are written, and
the rest need their axes renumbered. Operations that mix tokens or features (a projection) end the chain; so does dropout while it drops, whose
random numbers could not be those of the plain model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mhc_compile.passes.axes import carry_axis, permutation
from mhc_compile.passes.roles import op_name, tensor_value, writer_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.fx import Graph, Node

__all__ = ["Region", "lift", "region_between"]

#: One operand, value by value, in any layout. Further arguments are numbers and dtypes.
_UNARY = frozenset(
    "relu relu6 gelu silu mish elu celu selu leaky_relu hardswish hardsigmoid hardtanh softplus softsign sigmoid tanh clamp clamp_min clamp_max neg"
    " abs square sqrt rsqrt exp log pow __pow__ reciprocal to _to_copy float half bfloat16 double type contiguous clone".split()
)
#: Two operands, value by value; the second a number, a vector of C, or a tensor with the trunk's axes.
_BINARY = frozenset("add sub mul div truediv __mul__ __rmul__ __truediv__ __sub__ maximum minimum".split())
_NORMS = frozenset({"layer_norm", "rms_norm"})
#: Reductions over the feature axis, as a norm written by hand has them.
_REDUCTIONS = frozenset({"mean", "var", "sum"})
_RESHAPES = frozenset({"view", "reshape", "flatten", "_unsafe_view"})


class Region:
    """The trunk operations between the sum of one site and the skip of the next, in graph order, the skip last.

    `axes` gives for every operation, and for the sum itself, the axis that holds the features.
    """

    def __init__(self, source: Node, nodes: tuple[Node, ...], axes: dict[Node, int]) -> None:
        self.source = source
        self.nodes = nodes
        self.axes = axes

    @classmethod
    def empty(cls, trunk: Node, axis: int) -> Region:
        """No operations: a chain begins at `trunk`, or goes on with it."""
        return cls(trunk, (), {trunk: axis})


def region_between(source: Node, skip: Node, source_axis: int, skip_axis: int, order: dict[Node, int]) -> Region | None:
    """What stands between `source` and `skip`, if all of it can be lifted and carries the features from one axis to the other."""
    if source is skip:
        return Region.empty(source, source_axis) if source_axis == skip_axis else None
    ancestors: set[Node] = set()
    stack = [skip]
    while stack:
        node = stack.pop()
        if node not in ancestors and order[node] > order[source]:
            ancestors.add(node)
            stack.extend(node.all_input_nodes)
    axes: dict[Node, int] = {source: source_axis}
    nodes: list[Node] = []
    for node in sorted(ancestors, key=order.__getitem__):
        operands = [operand for operand in node.all_input_nodes if operand in axes]
        if not operands:
            continue
        axis = _lifted_axis(node, operands, axes)
        if axis is None or writer_of(node) is not None:
            return None
        axes[node] = axis
        nodes.append(node)
    if not nodes or nodes[-1] is not skip or axes[skip] != skip_axis:
        return None
    return Region(source, tuple(nodes), axes)


def _lifted_axis(node: Node, operands: Sequence[Node], axes: dict[Node, int]) -> int | None:
    """The feature axis of `node` if it can be lifted, None if it cannot."""
    name, value = op_name(node), tensor_value(node)
    first = operands[0]
    before, axis = tensor_value(first), axes[first]
    if value is None or before is None or len({axes[operand] for operand in operands}) != 1:
        return None
    others = [argument for argument in node.all_input_nodes if argument not in operands]
    last = axis == before.dim() - 1
    if name in _UNARY and not others and value.shape == before.shape:
        return axis
    if name == "dropout" and _drops_nothing(node):
        return axis
    if (
        name in _BINARY
        and value.dim() == before.dim()
        and all(_broadcasts(other, value.dim(), last) for other in others)
    ):
        return axis
    if name in _NORMS and last and len(_shape_argument(node)) == 1:
        return axis
    if name in _REDUCTIONS and last and _keeps_last(node, before.dim()):
        return axis
    if permutation(node, before.dim()) is not None and not others:
        return carry_axis(node, first, axis)
    if (
        name in _RESHAPES
        and last
        and value.dim() >= 2
        and value.shape[-1] == before.shape[-1]
        and value.dtype == before.dtype
    ):
        return value.dim() - 1
    return None


def _drops_nothing(node: Node) -> bool:
    probability = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
    training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
    return bool(probability == 0.0 or training is False)


def _broadcasts(other: Node, rank: int, last: bool) -> bool:
    value = tensor_value(other)
    return value is not None and (value.dim() in {0, rank} or (last and value.dim() == 1))


def _shape_argument(node: Node) -> tuple[Any, ...]:
    shape = node.args[1] if len(node.args) > 1 else node.kwargs.get("normalized_shape", ())
    return tuple(shape) if isinstance(shape, (tuple, list)) else ()


def _keeps_last(node: Node, rank: int) -> bool:
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    kept = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    single = dims[0] if isinstance(dims, (tuple, list)) and len(dims) == 1 else dims
    return kept is True and isinstance(single, int) and single % rank == rank - 1


def lift(graph: Graph, node: Node, lifted: dict[Node, Node], axes: dict[Node, int], n: int) -> Node:
    """Emits `node` for streams [..., n, C] at the insertion point of `graph`.

    before: y = layer_norm(x, (C,))                    after: ys = layer_norm(streams, (C,))
    before: y = x.reshape(-1, C)                       after: ys = streams.reshape(-1, n, C)
    before: y = x.permute(0, 2, 1)                     after: ys = streams (only the feature axis moved)
    before: y = x * gate        [B, 1, C]              after: ys = streams * gate.unsqueeze(-2)

    Args:
        graph: where to write.
        node: the trunk operation.
        lifted: the streams that stand for its operands.
        axes: the feature axis of the trunk values.
        n: number of streams.
    """
    name = op_name(node)
    trunk = next(operand for operand in node.all_input_nodes if operand in lifted)
    streams, before, axis = lifted[trunk], tensor_value(trunk), axes[trunk]
    assert before is not None
    order = permutation(node, before.dim())
    if order is not None:
        return _permute(graph, streams, order, axis)
    if name in _RESHAPES:
        return _reshape(graph, node, streams, before.dim(), n)

    def operand(argument: Node) -> Node:
        if argument in lifted:
            return lifted[argument]
        value = tensor_value(argument)
        if value is None or value.dim() < 2:
            return argument
        wide = argument if axis == value.dim() - 1 else graph.call_method("movedim", (argument, axis, -1))
        return graph.call_method("unsqueeze", (wide, -2))

    copy = graph.node_copy(node, operand)
    if name in _REDUCTIONS:  # the same axis, counted from the end: [..., n, C] has one axis more
        copy.args = (copy.args[0], -1, *copy.args[2:])
        copy.kwargs = {key: value for key, value in copy.kwargs.items() if key != "dim"}
    return copy


def _permute(graph: Graph, streams: Node, order: tuple[int, ...], axis: int) -> Node:
    tokens = [source for source in range(len(order)) if source != axis]
    moved = [tokens.index(source) for source in order if source != axis]
    rank = len(order)
    return graph.call_method("permute", (streams, *moved, rank - 1, rank))


def _reshape(graph: Graph, node: Node, streams: Node, rank: int, n: int) -> Node:
    after = tensor_value(node)
    assert after is not None
    given = node.args[1:]
    sizes: Sequence[Any] = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
    if op_name(node) == "flatten":
        # Token axes first..last become one; reshape finds its size.
        first, last = _flatten_range(node, rank)
        kept = [*range(first), -1, *range(last + 1, rank)]
        sizes = [-1 if axis == -1 else graph.call_method("size", (streams, axis)) for axis in kept]
    return graph.call_method("reshape", (streams, *sizes[:-1], n, int(after.shape[-1])))


def _flatten_range(node: Node, rank: int) -> tuple[int, int]:
    start = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)
    end = node.args[2] if len(node.args) > 2 else node.kwargs.get("end_dim", -1)
    return int(start) % rank, int(end) % rank  # type: ignore[arg-type]
