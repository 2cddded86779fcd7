"""Move a factor of a branch's output into the weights by which streams take it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.fx import Node

from mhc_compile.passes.analysis.op_info import PRODUCTS, QUOTIENTS, op_name, tensor_value
from mhc_compile.passes.core.emit import compute_example, inherit
from mhc_compile.passes.core.pass_base import Pass, copy_graph
from mhc_compile.passes.transforms.fuse_sites import gradient_modes

if TYPE_CHECKING:
    from torch.fx import Graph

_UPDATE = torch.ops.mhc.update.default


@dataclass(frozen=True)
class FoldScales(Pass):
    """Fold a factor that is the same for all features into `post`.

    before: S1 = mhc.update(S0, mul(f, s), post, res)      s: a number, [] or [..., 1]
    after:  S1 = mhc.update(S0, f, mul(post, s), res)

    The product has n elements a token instead of C, and its gradient likewise. Factors of
    stochastic depth, of `x + 0.1 f(x)` and of ReZero are such. Those for every feature stay.
    """

    name: ClassVar[str] = "fold-scales"

    def apply(self, graph: Graph) -> Graph:
        """Return a copy with folded factors, or the graph itself where there are none."""
        if not any(_factor(node) for node in graph.find_nodes(op="call_function", target=_UPDATE)):
            return graph
        copy, _ = copy_graph(graph)
        modes = gradient_modes(copy)
        for update in copy.find_nodes(op="call_function", target=_UPDATE):
            while (found := _factor(update)) is not None and modes[found[0]] == modes[update]:
                product, value, factor = found
                with copy.inserting_before(update):
                    post = copy.call_function(product.target, (update.args[2], factor))  # type: ignore[arg-type]
                inherit(post, product)
                modes[post] = modes[update]
                post.meta["example_value"] = compute_example(post.op, post.target, post.args, post.kwargs)
                update.args = (update.args[0], value, post, update.args[3])
                copy.erase_node(product)
        return copy


def _factor(update: Node) -> tuple[Node, Node, Any] | None:
    """Return the product that is the branch's output, what it multiplies, and by what."""
    product: Any = update.args[1]
    if product.op != "call_function" or len(product.users) != 1 or product.kwargs or len(product.args) != 2:
        return None
    one, other = product.args
    name = op_name(product)
    pairs = [(one, other), (other, one)] if name in PRODUCTS else [(one, other)] if name in QUOTIENTS else []
    out, post = tensor_value(product), tensor_value(update.args[2])  # type: ignore[arg-type]
    for value, factor in pairs:
        kept = tensor_value(value) if isinstance(value, Node) else None
        if kept is None or out is None or post is None or (kept.shape, kept.dtype) != (out.shape, out.dtype):
            continue
        if isinstance(factor, int | float) or (isinstance(factor, Node) and _is_narrow(factor, post)):
            return product, value, factor
    return None


def _is_narrow(factor: Node, post: torch.Tensor) -> bool:
    """Return whether a factor of [..., C] broadcasts to [..., n] just as well, in its dtype."""
    found = tensor_value(factor)
    if found is None or not found.is_floating_point() or torch.promote_types(found.dtype, post.dtype) != post.dtype:
        return False
    return found.dim() == 0 or (found.shape[-1] == 1 and found.dim() <= post.dim())
