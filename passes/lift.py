"""Trunk operations that can run on all streams at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhc_compile.passes.roles import op_name, tensor_value

if TYPE_CHECKING:
    from torch.fx import Graph, Node

__all__ = ["lift", "liftable"]

_RESHAPES = frozenset({"view", "reshape", "flatten"})


def liftable(node: Node) -> bool:
    """Whether `node` may stand between two sites of one chain.

    So far: views of the token axes that leave the feature axis alone, as in OPT's `[B, T, C] -> [B T, C]`, and `contiguous`.
    """
    if len(node.all_input_nodes) == 0 or op_name(node) not in _RESHAPES | {"contiguous"}:
        return False
    before, after = tensor_value(node.all_input_nodes[0]), tensor_value(node)
    if before is None or after is None or before.dim() < 2 or after.dim() < 2:
        return False
    if node.args[0] is not node.all_input_nodes[0] or before.shape[-1] != after.shape[-1]:
        return False
    # `view(dtype)` reinterprets bits: dtypes must agree. A symbolic size in the arguments would have to come from another node.
    return before.dtype == after.dtype and isinstance(after.shape[-1], int)


def lift(graph: Graph, node: Node, streams: Node, n: int) -> Node:
    """Emits `node` for streams [..., n, C] instead of a trunk [..., C]. The insertion point is the caller's.

    before: y = x.reshape(-1, C)                       after: ys = streams.reshape(-1, n, C)
    """
    if op_name(node) == "contiguous":
        return graph.call_method("contiguous", (streams,))
    before, after = tensor_value(node.all_input_nodes[0]), tensor_value(node)
    assert before is not None
    assert after is not None
    given = node.args[1:]
    sizes = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
    if op_name(node) == "flatten":
        # Token axes first..last become one; reshape finds its size.
        first, last = _flatten_range(node, before.dim())
        kept = [*range(first), -1, *range(last + 1, before.dim())]
        sizes = [-1 if axis == -1 else graph.call_method("size", (streams, axis)) for axis in kept]
    return graph.call_method("reshape", (streams, *sizes[:-1], n, int(after.shape[-1])))


def _flatten_range(node: Node, rank: int) -> tuple[int, int]:
    start = node.args[1] if len(node.args) > 1 else node.kwargs.get("start_dim", 0)
    end = node.args[2] if len(node.args) > 2 else node.kwargs.get("end_dim", -1)
    return int(start) % rank, int(end) % rank  # type: ignore[arg-type]
