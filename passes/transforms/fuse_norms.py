"""Let the operator that reads a branch's input compute the norm of it, too."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from mhc_compile import ops
from mhc_compile.passes.analysis.norms import Norm, norm_of
from mhc_compile.passes.analysis.op_info import is_inplace, is_random, known_tensor, tensor_value
from mhc_compile.passes.core.emit import compute_example
from mhc_compile.passes.core.pass_base import Pass, copy_graph
from mhc_compile.passes.transforms.fuse_sites import STEPS, gradient_modes

if TYPE_CHECKING:
    from torch.fx import Graph, Node

_READ = torch.ops.mhc.read.default
#: Operators that read h, and which of their results it is.
_READS = {_READ: 0, **dict.fromkeys(STEPS, 1)}


@dataclass(frozen=True)
class FuseNorms(Pass):
    """Fuse the norm at the beginning of a branch with the operator that reads the streams.

    before: S1, h1, ... = mhc.step(X, y, p, r, ..., eps)
            y1 = g(layer_norm(h1, (C,), w, b, 1e-5))
    after:  S1, h1, ... = mhc.step(X, y, p, r, ..., eps, "layer", w, b, 1e-5)
            y1 = g(h1)

    The kernel has h in the cache when all of it is known. Neither h nor its gradient is written,
    and h is not kept for the backward. A norm stays where anything else reads h, where it changes
    the dtype, and where there is no kernel.
    """

    name: ClassVar[str] = "fuse-norms"

    def apply(self, graph: Graph) -> Graph:
        """Return a copy with fused norms, or the graph itself where there are none."""
        if not any(map(_norm_after, graph.nodes)):
            return graph
        copy, _ = copy_graph(graph)
        modes = gradient_modes(copy)
        for node in list(copy.nodes):
            found = _norm_after(node)
            if found is None or any(modes[one] != modes[node] for one in found[1].nodes):
                continue
            h, norm = found
            vectors = [one for one in (norm.gain, norm.shift) if one is not None]
            if all(_bring(one, node) for one in vectors):
                node.args = (*node.args, norm.kind, norm.gain, norm.shift, norm.eps)
                example = compute_example(node.op, node.target, node.args, node.kwargs)
                if example is not None:
                    node.meta["example_value"] = example
                norm.result.replace_all_uses_with(h)
                for one in reversed(norm.nodes):
                    copy.erase_node(one)
        return copy


def _norm_after(read: Node) -> tuple[Node, Norm] | None:
    """Return h and its norm, if `read` can compute it."""
    if read.target not in _READS or "rms" in read.args or "layer" in read.args:
        return None
    parts = [user for user in read.users if user.target is operator.getitem and user.args[1] == _READS[read.target]]
    norm = norm_of(parts[0]) if len(parts) == 1 and parts[0].users else None
    return (parts[0], norm) if norm is not None and _has_kernel(read) else None


def _has_kernel(read: Node) -> bool:
    streams: Any = read.args[0]
    branch: Any = streams if read.target is _READ else read.args[1]
    n = read.args[4] if read.target is _READ else known_tensor(read.args[2]).shape[-1]  # type: ignore[arg-type]
    mapping = next((one for one in read.args if isinstance(one, str)), None)
    return ops.takes_norm(known_tensor(streams), known_tensor(branch), int(n), mapping)  # type: ignore[arg-type]


def _bring(vector: Node, read: Node) -> bool:
    """Move what computes a weight [C] before `read`; return whether that is possible.

    It computes the same there if nothing is written between the two places. It lies between the
    read and the norm, and so in their section of the gradient mode.
    """
    if vector < read:
        return True
    value = tensor_value(vector)
    if value is None or value.dim() > 1 or is_random(vector):
        return False
    node = read
    while node is not vector:
        node = node.next
        if is_inplace(node):
            return False
    if not all(_bring(one, read) for one in vector.all_input_nodes):
        return False
    read.prepend(vector)
    return True
