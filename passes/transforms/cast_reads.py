"""Let an operator write the branch's input h in the dtype that the branch computes in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from mhc_compile.passes.analysis.op_info import cast_of, known_tensor
from mhc_compile.passes.core.pass_base import Pass, copy_graph

if TYPE_CHECKING:
    from torch.fx import Graph, Node

_mhc = torch.ops.mhc
#: Operators that write h, and where it is among their results.
_READS: dict[Any, int] = {
    _mhc.read.default: 0,
    _mhc.step.default: 1,
    _mhc.shifted_step.default: 1,
    _mhc.mix_read.default: 1,
    _mhc.lazy_step.default: 1,
}
#: Their backwards, and where the gradient of h is among their arguments.
_BACKWARDS: dict[Any, int] = {
    _mhc.read_backward.default: 0,
    _mhc.step_backward.default: 1,
    _mhc.shifted_step_backward.default: 1,
    _mhc.mix_read_backward.default: 1,
    _mhc.lazy_step_backward.default: 1,
}


@dataclass(frozen=True)
class CastReads(Pass):
    """Cast h where it is written, and its gradient where it is read: under autocast, on CUDA.

    before: S1, h, ... = mhc.step(S0, y, post, res, ...)      float32
            h16 = h.to(bfloat16)
            ...
            g = g16.to(float32)
            dS0, ... = mhc.step_backward(dS1, g, ...)

    after:  S1, h16, ... = mhc.step(S0, y, post, res, ..., read_dtype=bfloat16)
            ...
            dS0, ... = mhc.step_backward(dS1, g16, ...)

    The graph is AOTAutograd's, of forward and backward together. The numbers are the same: the
    kernels compute in float32. h stays as it is where something reads it uncast, and where streams
    are not float32: it would be rounded once instead of twice.
    """

    name: ClassVar[str] = "cast-reads"

    def apply(self, graph: Graph) -> Graph:
        """Return a copy without these casts, or the graph itself where there are none."""
        if not any(_casts(node) or _widened(node) for node in graph.nodes):
            return graph
        copy, _ = copy_graph(graph)
        for node in list(copy.nodes):
            if casts := _casts(node):
                (h,) = casts[0].all_input_nodes
                node.kwargs = {**node.kwargs, "read_dtype": known_tensor(casts[0]).dtype}
                node.meta.pop("eager_input_vals", None)
                h.meta = {**h.meta, "val": casts[0].meta["val"]}
                results = list(node.meta["val"])
                results[_READS[node.target]] = h.meta["val"]
                node.meta["val"] = type(node.meta["val"])(results)
                for cast in casts:
                    cast.replace_all_uses_with(h)
                    copy.erase_node(cast)
            if (wide := _widened(node)) is not None:
                node.update_arg(_BACKWARDS[node.target], wide.all_input_nodes[0])
                node.meta.pop("eager_input_vals", None)
                if not wide.users:
                    copy.erase_node(wide)
        return copy


def _casts(node: Node) -> list[Node]:
    """Return the casts of a node's h to half precision, if all that read it are such."""
    results = [user for user in node.users if node.target in _READS and user.args[1:] == (_READS[node.target],)]
    if len(results) != 1:
        return []
    h = known_tensor(results[0])
    if h.device.type != "cuda" or h.dtype != torch.float32:
        return []
    casts = list(results[0].users)
    dtypes = {cast_of(user) for user in casts}
    return casts if len(dtypes) == 1 and dtypes <= {torch.bfloat16, torch.float16} else []


def _widened(node: Node) -> Node | None:
    """Return the cast to float32 of the gradient of h that a backward gets."""
    grad: Any = node.args[_BACKWARDS[node.target]] if node.target in _BACKWARDS else None
    if grad is None or cast_of(grad) != torch.float32:
        return None
    source = known_tensor(grad.all_input_nodes[0])
    return grad if source.device.type == "cuda" and source.dtype in (torch.bfloat16, torch.float16) else None
