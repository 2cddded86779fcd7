"""Rules that write other operations for streams: dropout, batch norm, anything under `vmap`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from mhc_compile.passes.analysis.feature_axis import RESHAPES, carry_axis, whole_axis
from mhc_compile.passes.analysis.op_info import (
    example_value,
    is_random,
    known_tensor,
    leaf_module,
    op_name,
    passes_value,
)
from mhc_compile.passes.core.emit import is_copies, trace_into
from mhc_compile.passes.lifting.trunk_op import Obstacle, Rule, TrunkOp

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor
    from torch.fx import Graph, Node

log = logging.getLogger(__name__)

#: One operand; zeroes some of it and scales the rest.
_DROPOUTS = frozenset({"dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"})
#: Alpha dropout is missing: it shifts what it keeps, and one mask cannot say that.
_DROPOUT_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class Dropped(Rule):
    """Dropout, with one mask for all streams: the random numbers that the plain model draws.

    before: y = dropout(x, 0.1)
    after:  ys = streams * dropout(ones_like(x), 0.1).unsqueeze(-2)
    """

    def axis(self, op: TrunkOp) -> int | None:
        drops = op_name(op.node) in _DROPOUTS or isinstance(leaf_module(op.node), _DROPOUT_MODULES)
        return op.axis if drops and len(op.node.all_input_nodes) == 1 else None

    def emit(self, graph: Graph, op: TrunkOp, lifted: Mapping[Node, Node], before: Node) -> Node:
        streams = lifted[op.operands[0]]
        # The mask is drawn in memory order, so the layout must be the trunk's. Copies of the trunk
        # still have it; an example value may not (max_pool1d lays out its result otherwise where it
        # keeps indices).
        dense = not is_copies(streams) and op.before.is_contiguous()
        layout = torch.contiguous_format if dense else torch.preserve_format
        with graph.inserting_before(before):
            ones = graph.call_method("select", (streams, -2, 0))
            if not op.last:
                ones = graph.call_method("movedim", (ones, -1, op.axis))
            ones = graph.call_function(torch.ones_like, (ones,), {"memory_format": layout})
            mask = graph.node_copy(op.node, lambda _: ones)
            mask.meta = {}
            if not op.last:
                mask = graph.call_method("movedim", (mask, op.axis, -1))
            return graph.call_function(torch.mul, (streams, graph.call_method("unsqueeze", (mask, -2))))


class BatchNorm(Rule):
    """Batch norm of features on axis 1, with statistics over the tokens of all streams.

    Where the streams are equal, running statistics move as in the plain model: n N values that are
    copies of N are no larger a sample, so the correction of the running variance stays that of N.

    before: y = batch_norm(x, mean, var, w, b, True)
    after:  flat = streams.reshape(-1, C); ys = batch_norm(flat, ...).reshape(...)
            mean.lerp_(flat.mean(0), momentum); var.lerp_(...)
    """

    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")

    def axis(self, op: TrunkOp) -> int | None:
        fits = op_name(op.node) == "batch_norm" and op.axis == 1 and op.node.args[:1] == op.operands
        return 1 if fits else None

    def emit(self, graph: Graph, op: TrunkOp, lifted: Mapping[Node, Node], before: Node) -> Node:
        given: dict[str, Any] = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
        # ATen and `torch.batch_norm` take weight and bias first, `F.batch_norm` the statistics
        functional = op.node.target is F.batch_norm
        names = self.names if functional else ("input", *self.names[3:5], *self.names[1:3], *self.names[5:])
        given.update(zip(names, op.node.args, strict=False))
        given.update(op.node.kwargs)
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

        operands = [lifted[op.operands[0]], *(given[name] for name in tensors)]
        return trace_into(graph, normalise, operands, before=before, like=op.node)  # type: ignore[no-any-return]


class Vmapped(Rule):
    """Any other operation that `torch.func.vmap` runs and that keeps the features' axis whole.

    before: y = max_pool2d(x, 2)
    after:  (the same under vmap, as ATen operations)
    """

    def axis(self, op: TrunkOp) -> int | Obstacle | None:
        node, value = op.node, op.value
        if node.op not in {"call_function", "call_method"} or is_random(node) or not passes_value(node):
            return None
        reshaped = op_name(node) in RESHAPES
        carried = whole_axis(op.before, value, op.axis) if reshaped else carry_axis(node, op.operands[0], op.axis)
        if carried is None or not 0 <= carried < value.dim() or not isinstance(value.shape[carried], int):
            return None
        wide = [known_tensor(operand).movedim(op.axes[operand], -1).unsqueeze(-2) for operand in op.operands]
        copies = [value.expand(*value.shape[:-2], 2, -1) for value in wide]  # two are enough to see the axes
        others = [example_value(other) for other in op.others]
        try:
            with torch.no_grad():
                # Batching rules may depend on the layout. Streams begin as copies, and are
                # contiguous from the first update on.
                self._function(op, carried)(*copies, *others)
                result = self._function(op, carried)(*(each.contiguous() for each in copies), *others)
        # a batching rule may raise anything; the chain ends here, and the verdict says why
        except Exception as error:
            log.debug("%s cannot run under vmap", node, exc_info=True)
            return Obstacle(node, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}", unexpected=True)
        wanted = [size for position, size in enumerate(value.shape) if position != carried]
        return carried if list(result.shape) == [*wanted, 2, value.shape[carried]] else None

    def emit(self, graph: Graph, op: TrunkOp, lifted: Mapping[Node, Node], before: Node) -> Node:
        operands = [*(lifted[operand] for operand in op.operands), *op.others]
        function = self._function(op, op.axes[op.node])
        return trace_into(graph, function, operands, before=before, like=op.node)  # type: ignore[no-any-return]

    @staticmethod
    def _function(op: TrunkOp, carried: int) -> Callable[..., Tensor]:
        """Return the operation as a function from streams and its other arguments to streams."""
        node, others = op.node, op.others

        def one(*values: Any) -> Any:
            given = dict(zip((*op.operands, *others), values, strict=True))
            given.update({operand: given[operand].movedim(-1, op.axes[operand]) for operand in op.operands})
            args = torch.fx.map_arg(node.args, given.__getitem__)
            kwargs = torch.fx.map_arg(node.kwargs, given.__getitem__)
            call: Any = node.target if node.op == "call_function" else getattr(type(args[0]), str(node.target))
            return call(*args, **kwargs).movedim(carried, -1)

        batched = (*[-2] * len(op.operands), *[None] * len(others))
        return torch.func.vmap(one, in_dims=batched, out_dims=-2)
