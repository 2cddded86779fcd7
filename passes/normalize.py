"""One spelling for every addition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from mhc_compile.passes.base import Pass, copy_graph
from mhc_compile.passes.roles import ADDS, INPLACE_ADDS, is_inplace, is_view, op_name, tensor_value

if TYPE_CHECKING:
    from torch.fx import Graph, Node

__all__ = ["NormalizeAdds"]


@dataclass(frozen=True)
class NormalizeAdds(Pass):
    """Writes every addition of two tensors as `torch.add(a, b)`.

    before: iadd = operator.iadd(out, identity)        after: add = torch.add(out, identity)
    before: y = out.add(identity, alpha=2)             after: mul = torch.mul(identity, 2); y = torch.add(out, mul)

    An in-place add becomes an ordinary one only where nobody can tell the difference: the operand that it writes is no graph input, shares no
    storage with another value, and is not read again. Elsewhere it keeps its spelling, and `find` refuses it as MUTATED_OPERAND.
    Additions of numbers, of integers and of sizes are left alone.
    """

    name: ClassVar[str] = "normalize-adds"

    def apply(self, graph: Graph) -> Graph:
        """A copy of `graph` in which every harmless addition has the one spelling."""
        copy, _ = copy_graph(graph)
        order = {node: position for position, node in enumerate(copy.nodes)}
        for node in list(copy.nodes):
            name = op_name(node)
            if name not in ADDS | INPLACE_ADDS:
                continue
            terms = _terms(node)
            if terms is None or (name in INPLACE_ADDS and not _harmless(node, terms, order)):
                continue
            _respell(node, terms)
        return copy


def _terms(node: Node) -> tuple[Node, Node] | None:
    """The two tensors that are added, None where one term is a number or unknown."""
    second = node.args[1] if len(node.args) > 1 else node.kwargs.get("other")
    first = node.args[0] if node.args else node.kwargs.get("input")
    if not (isinstance(first, torch.fx.Node) and isinstance(second, torch.fx.Node)):
        return None
    if tensor_value(first) is None or tensor_value(second) is None or "out" in node.kwargs:
        return None
    return first, second


def _harmless(node: Node, terms: tuple[Node, Node], order: dict[Node, int]) -> bool:
    target, other = terms
    if target.op in {"placeholder", "get_attr"} or target is other or is_view(target) or is_inplace(target):
        return False
    narrow, added = tensor_value(target), tensor_value(other)
    if narrow is None or added is None or torch.result_type(narrow, added) != narrow.dtype:
        return False
    # Other names of the storage that is written: views, and the results of earlier in-place operations on it.
    aliases = [user for user in target.users if user is not node and (is_view(user) or is_inplace(user))]
    late = [
        user for value in (target, *aliases) for user in value.users if user is not node and order[user] > order[node]
    ]
    return not late and other not in aliases


def _respell(node: Node, terms: tuple[Node, Node]) -> None:
    graph, (first, second) = node.graph, terms
    alpha = node.kwargs.get("alpha", 1)
    with graph.inserting_before(node):
        if alpha != 1:
            scaled = graph.call_function(torch.mul, (second, alpha))
            scaled.meta = {key: value for key, value in node.meta.items() if key in {"nn_module_stack", "stack_trace"}}
            scaled.meta["example_value"] = tensor_value(second)
            second = scaled
    node.op, node.target = "call_function", torch.add
    node.args, node.kwargs = (first, second), {}
