"""Write every addition in one spelling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from mhc_compile.passes.analysis.op_info import ADDS, known_tensor, op_name, tensor_value
from mhc_compile.passes.core.emit import inherit
from mhc_compile.passes.core.pass_base import Pass, copy_graph

if TYPE_CHECKING:
    from torch.fx import Graph, Node


@dataclass(frozen=True)
class NormalizeAdds(Pass):
    """Write every addition of two tensors as `torch.add(a, b)`.

    before: y = operator.add(out, identity)            after: y = torch.add(out, identity)
    before: y = out.add(identity, alpha=2)
    after:  mul = torch.mul(identity, 2); y = torch.add(out, mul)
    before: y = x - out            (the same shape)
    after:  neg = torch.neg(out); y = torch.add(x, neg)
    before: y = torch.addcmul(x, gate, out)
    after:  mul = torch.mul(gate, out); y = torch.add(x, mul)

    In-place additions that could be replaced already were (`FunctionalizeWrites`); the others stay,
    and planning rejects them as MUTATED_OPERAND. Additions of numbers, integers and sizes stay as
    well.
    """

    name: ClassVar[str] = "normalize-adds"

    def apply(self, graph: Graph) -> Graph:
        """Return a copy of `graph` whose additions are `torch.add`, except in-place ones."""
        copy, _ = copy_graph(graph)
        for node in list(copy.nodes):
            if op_name(node) == "addcmul":
                _split_addcmul(node)
            elif op_name(node) in {"sub", "subtract", "__sub__"}:
                _negate(node)
            if op_name(node) in ADDS and (terms := _terms(node)) is not None:
                _respell(node, terms)
        return copy


def _terms(node: Node) -> tuple[Node, Node] | None:
    """Return the two tensors that are added, None where one term is a number or unknown."""
    second = node.args[1] if len(node.args) > 1 else node.kwargs.get("other")
    first = node.args[0] if node.args else node.kwargs.get("input")
    if not (isinstance(first, torch.fx.Node) and isinstance(second, torch.fx.Node)):
        return None
    if tensor_value(first) is None or tensor_value(second) is None or "out" in node.kwargs:
        return None
    return first, second


def _split_addcmul(node: Node) -> None:
    factors = [*node.args, *(node.kwargs[name] for name in ("tensor1", "tensor2") if name in node.kwargs)]
    if len(factors) != 3 or not all(isinstance(factor, torch.fx.Node) for factor in factors) or "out" in node.kwargs:
        return
    first, one, other = (tensor_value(factor) for factor in factors)  # type: ignore[arg-type]
    if first is None or one is None or other is None:
        return
    with node.graph.inserting_before(node), torch.no_grad():
        product = node.graph.call_function(torch.mul, tuple(factors[1:]))
        product.meta["example_value"] = one * other
    inherit(product, node)
    value = node.kwargs.get("value", 1)
    node.op, node.target = "call_function", torch.add
    node.args, node.kwargs = (factors[0], product), {} if value == 1 else {"alpha": value}


def _negate(node: Node) -> None:
    """Write a difference of two floating-point tensors of one shape as a sum."""
    terms = _terms(node)
    if terms is None:
        return
    first, second = map(known_tensor, terms)
    if first.shape != second.shape or not (first.is_floating_point() and second.is_floating_point()):
        return
    with node.graph.inserting_before(node), torch.no_grad():
        negative = node.graph.call_function(torch.neg, (terms[1],))
        negative.meta["example_value"] = -second
    inherit(negative, node)
    node.op, node.target = "call_function", torch.add
    node.args = (terms[0], negative)
    node.kwargs = {"alpha": node.kwargs["alpha"]} if "alpha" in node.kwargs else {}


def _respell(node: Node, terms: tuple[Node, Node]) -> None:
    (first, second), alpha = terms, node.kwargs.get("alpha", 1)
    if alpha != 1:
        with node.graph.inserting_before(node):
            scaled = node.graph.call_function(torch.mul, (second, alpha))
        inherit(scaled, node)
        scaled.meta["example_value"] = tensor_value(second)
        second = scaled
    node.op, node.target, node.args, node.kwargs = "call_function", torch.add, (first, second), {}
