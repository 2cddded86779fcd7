"""Trunk operations that run on all streams at once.

Between two sites of a chain there may be operations on the trunk itself: a norm (post-norm models), an activation (ResNet), a cast, a view, a
pooling; and between the trunk and the skip of one site a scale (DeepNorm) or a slice. Streams are [..., n, C] with the token axes in the order in
which the trunk has them, so most of these operations act on streams as they are written, and some need their axes renumbered. Dropout draws the
plain model's mask and applies it to every stream; batch norm takes its statistics over all of them. What is left runs under `torch.func.vmap`, if
it can. Contractions (a projection) are expensive: they end the chain.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from mhc_compile.passes.analysis.feature_axis import RESHAPES, carry_axis, permutation, whole_axis
from mhc_compile.passes.analysis.op_info import (
    is_contraction,
    is_inplace,
    is_random,
    is_region,
    leaf_module,
    op_name,
    passes_value,
    tensor_value,
)
from mhc_compile.passes.core.emit import trace_into

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor
    from torch.fx import Graph, Node

__all__ = ["lift", "lifted_axis"]

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
#: Reshapes whose sizes can be written anew.
_SIZED = frozenset({"view", "reshape", "flatten", "_unsafe_view"})
#: One operand; zeroes some of it and scales the rest.
_DROPOUTS = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"})
#: Activations as leaf modules of a symbolically traced graph.
_UNARY_MODULES = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.CELU, nn.SELU, nn.LeakyReLU, nn.Hardswish, nn.Hardsigmoid,
    nn.Hardtanh, nn.Softplus, nn.Softsign, nn.Sigmoid, nn.Tanh,
)  # fmt: skip


@dataclass(frozen=True)
class _Step:
    """One trunk operation that is looked at: its operands on the trunk, and where their features lie."""

    node: Node
    operands: tuple[Node, ...]
    axes: Mapping[Node, int]
    value: Tensor
    before: Tensor

    @classmethod
    def of(cls, node: Node, operands: Iterable[Node], axes: Mapping[Node, int]) -> _Step | None:
        """None where shapes are not known."""
        listed = tuple(operands)
        value, before = tensor_value(node), tensor_value(listed[0])
        return None if value is None or before is None else cls(node, listed, axes, value, before)

    @property
    def axis(self) -> int:
        """The feature axis of the first operand."""
        return self.axes[self.operands[0]]

    @property
    def last(self) -> bool:
        """Whether the features lie on the last axis, as they do in the streams."""
        return self.axis == self.before.dim() - 1

    @property
    def others(self) -> list[Node]:
        """Operands that are not on the trunk."""
        return [argument for argument in self.node.all_input_nodes if argument not in self.operands]


class _Rule(ABC):
    """How one kind of operation runs on streams."""

    @abstractmethod
    def axis(self, step: _Step) -> int | None:
        """Where the result has its features, None if the rule does not apply."""

    @abstractmethod
    def emit(self, graph: Graph, step: _Step, lifted: Mapping[Node, Node], before: Node) -> Node:
        """Writes the operation for streams in front of `before`."""


class _AsWritten(_Rule):
    """Operations that act on [..., n, C] as they act on the trunk.

    before: y = layer_norm(x, (C,))                    after: ys = layer_norm(streams, (C,))
    before: y = x * gate        [B, 1, C]              after: ys = streams * gate.unsqueeze(-2)
    """

    def axis(self, step: _Step) -> int | None:
        name, module, axis = op_name(step.node), leaf_module(step.node), step.axis
        if len({step.axes[operand] for operand in step.operands}) != 1:
            return None
        unary = name in _UNARY or isinstance(module, _UNARY_MODULES)
        norm = name in _NORMS and len(_shape_argument(step.node)) == 1
        leaf_norm = isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) == 1
        rank = step.value.dim()
        fits = (
            (unary and not step.others and step.value.shape == step.before.shape)
            or (
                name in _BINARY
                and rank == step.before.dim()
                and all(_broadcasts(other, rank, step.last) for other in step.others)
            )
            or (step.last and (norm or leaf_norm))
            or (step.last and name in _REDUCTIONS and _keeps_last(step.node, step.before.dim()))
        )
        return axis if fits else None

    def emit(self, graph: Graph, step: _Step, lifted: Mapping[Node, Node], before: Node) -> Node:
        def operand(argument: Node) -> Node:
            if argument in lifted:
                return lifted[argument]
            value = tensor_value(argument)
            if value is None or value.dim() < 2:
                return argument
            at = step.axis
            wide = argument if at == value.dim() - 1 else graph.call_method("movedim", (argument, at, -1))
            return graph.call_method("unsqueeze", (wide, -2))

        with graph.inserting_before(before):
            copy = graph.node_copy(step.node, operand)
        copy.meta = {}
        if op_name(step.node) in _REDUCTIONS:  # the same axis, counted from the end: [..., n, C] has one axis more
            copy.args = (copy.args[0], -1, *copy.args[2:])
            copy.kwargs = {key: value for key, value in copy.kwargs.items() if key != "dim"}
        return copy


class _Permuted(_Rule):
    """Permutations: the token axes are counted anew.

    before: y = x.permute(0, 2, 1)                     after: ys = streams (only the feature axis moved)
    """

    def axis(self, step: _Step) -> int | None:
        if len(step.node.all_input_nodes) != 1 or permutation(step.node, step.before.dim()) is None:
            return None
        return carry_axis(step.node, step.operands[0], step.axis)

    def emit(self, graph: Graph, step: _Step, lifted: Mapping[Node, Node], before: Node) -> Node:
        order = permutation(step.node, step.before.dim())
        assert order is not None
        rank = len(order)
        tokens = [source for source in range(rank) if source != step.axis]
        moved = [tokens.index(source) for source in order if source != step.axis]
        with graph.inserting_before(before):
            return graph.call_method("permute", (lifted[step.operands[0]], *moved, rank - 1, rank))


class _Reshaped(_Rule):
    """Reshapes of the token axes.

    before: y = x.reshape(-1, C)                       after: ys = streams.reshape(-1, n, C)
    """

    def axis(self, step: _Step) -> int | None:
        fits = (
            op_name(step.node) in _SIZED
            and step.last
            and step.value.dim() >= 2
            and step.value.shape[-1] == step.before.shape[-1]
            and step.value.dtype == step.before.dtype
        )
        return step.value.dim() - 1 if fits else None

    def emit(self, graph: Graph, step: _Step, lifted: Mapping[Node, Node], before: Node) -> Node:
        streams = lifted[step.operands[0]]
        example = tensor_value(streams)
        assert example is not None
        given = step.node.args[1:]
        sizes: Sequence[Any] = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
        with graph.inserting_before(before):
            if op_name(step.node) == "flatten":
                # Token axes first..last become one; reshape finds its size.
                first, last = _flatten_range(step.node, step.before.dim())
                kept = [*range(first), -1, *range(last + 1, step.before.dim())]
                sizes = [-1 if axis == -1 else graph.call_method("size", (streams, axis)) for axis in kept]
            shape = (*sizes[:-1], int(example.shape[-2]), int(step.value.shape[-1]))
            return graph.call_method("reshape", (streams, *shape))


class _Dropped(_Rule):
    """Dropout: one mask for all streams, made of the random numbers that the plain model draws.

    before: y = dropout(x, 0.1)                        after: ys = streams * dropout(ones_like(x), 0.1).unsqueeze(-2)
    """

    def axis(self, step: _Step) -> int | None:
        drops = op_name(step.node) in _DROPOUTS or isinstance(leaf_module(step.node), nn.modules.dropout._DropoutNd)
        return step.axis if drops and len(step.node.all_input_nodes) == 1 else None

    def emit(self, graph: Graph, step: _Step, lifted: Mapping[Node, Node], before: Node) -> Node:
        streams = lifted[step.operands[0]]
        # The mask is drawn in the order of memory: the layout must be the trunk's. Streams that were just spread still have it; an example value
        # may not (max_pool1d lays out its result otherwise where it keeps indices).
        spread = op_name(streams) == "expand"
        dense = not spread and step.before.is_contiguous()
        layout = torch.contiguous_format if dense else torch.preserve_format
        with graph.inserting_before(before):
            ones = graph.call_method("select", (streams, -2, 0))
            if not step.last:
                ones = graph.call_method("movedim", (ones, -1, step.axis))
            ones = graph.call_function(torch.ones_like, (ones,), {"memory_format": layout})
            mask = graph.node_copy(step.node, lambda _: ones)
            mask.meta = {}
            if not step.last:
                mask = graph.call_method("movedim", (mask, step.axis, -1))
            return graph.call_function(torch.mul, (streams, graph.call_method("unsqueeze", (mask, -2))))


class _BatchNorm(_Rule):
    """Batch norm of features on axis 1, statistics over the tokens of all streams.

    Running statistics move as in the plain model where the streams are equal: it corrects the running variance for N tokens, and n N values that
    are copies of N are no larger a sample, so the correction stays.

    before: y = batch_norm(x, mean, var, w, b, True)   after: flat = streams.reshape(-1, C); ys = batch_norm(flat, ...).reshape(...)
                                                              mean.lerp_(flat.mean(0), momentum); var.lerp_(...)
    """

    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")

    def axis(self, step: _Step) -> int | None:
        fits = op_name(step.node) == "batch_norm" and step.axis == 1 and step.node.args[:1] == step.operands
        return 1 if fits else None

    def emit(self, graph: Graph, step: _Step, lifted: Mapping[Node, Node], before: Node) -> Node:
        given: dict[str, Any] = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
        # ATen (and `torch.batch_norm`) take weight and bias first, the functional form the running statistics.
        functional = step.node.target is F.batch_norm
        names = self.names if functional else ("input", *self.names[3:5], *self.names[1:3], *self.names[5:])
        given.update(zip(names, step.node.args, strict=False))
        given.update(step.node.kwargs)
        tensors = [name for name in self.names[1:5] if isinstance(given[name], torch.fx.Node)]

        def normalise(streams: Tensor, *rest: Tensor) -> Tensor:
            have: dict[str, Tensor | None] = dict.fromkeys(self.names[1:5])
            have.update(zip(tensors, rest, strict=True))
            mean, var, scale, shift = (have[name] for name in self.names[1:5])
            flat, eps = streams.reshape(-1, streams.shape[-1]), given["eps"]
            if not given["training"]:
                return F.batch_norm(flat, mean, var, scale, shift, False, 0.0, eps).reshape(streams.shape)
            if mean is not None and var is not None:
                tokens, seen = flat.shape[0] // streams.shape[-2], flat.detach()
                spread = seen.var(0, correction=0) * tokens / (tokens - 1)
                mean.lerp_(seen.mean(0).to(mean.dtype), given["momentum"])
                var.lerp_(spread.to(var.dtype), given["momentum"])
            return F.batch_norm(flat, None, None, scale, shift, True, 0.0, eps).reshape(streams.shape)

        operands = [lifted[step.operands[0]], *(given[name] for name in tensors)]
        result: Node = trace_into(graph, normalise, operands, before=before, like=step.node)
        return result


class _Vmapped(_Rule):
    """Anything else that `torch.func.vmap` can run, and that keeps the features on an axis of their own.

    before: y = max_pool2d(x, 2)                       after: (the same under vmap, as ATen operations)
    """

    def axis(self, step: _Step) -> int | None:
        node, value = step.node, step.value
        if node.op not in {"call_function", "call_method"} or is_random(node) or not passes_value(node):
            return None
        reshaped = op_name(node) in RESHAPES
        carried = (
            whole_axis(step.before, value, step.axis) if reshaped else carry_axis(node, step.operands[0], step.axis)
        )
        if carried is None or not 0 <= carried < value.dim() or not isinstance(value.shape[carried], int):
            return None
        streams = [self._example(operand, step.axes[operand]) for operand in step.operands]
        others = [other.meta.get("example_value", other.meta.get("val")) for other in step.others]
        try:
            with torch.no_grad():
                result = self._function(step, carried)(*streams, *others)
        except Exception:  # whatever a batching rule raises, the answer is the same: the chain ends here
            return None
        wanted = [size for position, size in enumerate(value.shape) if position != carried]
        return carried if list(result.shape) == [*wanted, 2, value.shape[carried]] else None

    def emit(self, graph: Graph, step: _Step, lifted: Mapping[Node, Node], before: Node) -> Node:
        operands = [*(lifted[operand] for operand in step.operands), *step.others]
        function = self._function(step, step.axes[step.node])
        result: Node = trace_into(graph, function, operands, before=before, like=step.node)
        return result

    @staticmethod
    def _example(node: Node, axis: int) -> Tensor:
        """Two streams, for a trunk value."""
        value = tensor_value(node)
        assert value is not None
        return value.movedim(axis, -1).unsqueeze(-2).expand(*[-1] * (value.dim() - 1), 2, -1)

    @staticmethod
    def _function(step: _Step, carried: int) -> Callable[..., Tensor]:
        """The operation as a function of streams [..., n, C] and of its other arguments, giving streams."""
        node, others = step.node, step.others

        def one(*values: Any) -> Any:
            given = dict(zip((*step.operands, *others), values, strict=True))
            given.update({operand: given[operand].movedim(-1, step.axes[operand]) for operand in step.operands})
            args = torch.fx.map_arg(node.args, given.__getitem__)
            kwargs = torch.fx.map_arg(node.kwargs, given.__getitem__)
            call: Any = node.target if node.op == "call_function" else getattr(type(args[0]), str(node.target))
            return call(*args, **kwargs).movedim(carried, -1)

        batched = (*[-2] * len(step.operands), *[None] * len(others))
        return torch.func.vmap(one, in_dims=batched, out_dims=-2)


#: The first that applies is taken: from what stays readable in the graph to what can be said only as a function.
_RULES: tuple[_Rule, ...] = (_AsWritten(), _Permuted(), _Reshaped(), _Dropped(), _BatchNorm(), _Vmapped())


def lifted_axis(node: Node, operands: Iterable[Node], axes: Mapping[Node, int]) -> int | None:
    """The feature axis of `node` if it can run on streams, None if it cannot. `axes` gives the feature axis of its trunk operands."""
    step = _Step.of(node, operands, axes)
    if step is None or is_contraction(node) or is_region(node) or is_inplace(node):
        return None
    return next((axis for rule in _RULES if (axis := rule.axis(step)) is not None), None)


def lift(graph: Graph, node: Node, lifted: Mapping[Node, Node], axes: Mapping[Node, int], before: Node) -> Node:
    """Emits `node` for streams [..., n, C] in front of `before`. What that looks like is said at each rule.

    Args:
        graph: where to write.
        node: the trunk operation, for which `lifted_axis` gave an axis.
        lifted: the streams that stand for its operands.
        axes: the feature axis of the operands and of `node`.
        before: the node in front of which to write.
    """
    step = _Step.of(node, [operand for operand in node.all_input_nodes if operand in lifted], axes)
    assert step is not None
    rule = next(rule for rule in _RULES if rule.axis(step) is not None)
    return rule.emit(graph, step, lifted, before)


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


def _flatten_range(node: Node, rank: int) -> tuple[int, int]:
    start = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)
    end = node.args[2] if len(node.args) > 2 else node.kwargs.get("end_dim", -1)
    return int(start) % rank, int(end) % rank  # type: ignore[arg-type]
