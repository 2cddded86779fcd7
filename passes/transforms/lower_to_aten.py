"""Lower a rewritten graph to plain ATen, which runs without this package and Python.

A compiler backend keeps the `mhc::` operators: it has decompositions and kernels for them. An
exported program is a file that other processes and other languages read: there every `mhc::`
operator becomes the ATen operations of its reference (`LowerOperators`), and the torch functions
and tensor methods that passes wrote become ATen too (`CanonicalizeAten`).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from mhc_compile import ops
from mhc_compile._torch import is_higher_order, is_overload
from mhc_compile.passes.analysis.op_info import example_value, op_name
from mhc_compile.passes.core.emit import trace_into
from mhc_compile.passes.core.pass_base import Pass, copy_graph

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.fx import Graph, Node

#: Functions that are one ATen operation with the same arguments: their nodes are kept.
_OVERLOADS: dict[Any, Any] = {torch.add: torch.ops.aten.add.Tensor}


@dataclass(frozen=True)
class LowerOperators(Pass):
    """Replace every `mhc::` operator by the ATen operations that compute it.

    before: h = mhc.collapse(streams, pre)
    after:  unsqueeze = aten.unsqueeze(pre, -1); mul = aten.mul(unsqueeze, streams)
            h = aten.sum(mul, [-2])

    Operators that an operator consists of (`mhc::sinkhorn` inside `mhc::coefficients`) are replaced
    too. Results have the strides that the operator promises. Sizes that are numbers in the example
    values are written as numbers.
    """

    name: ClassVar[str] = "lower-operators"

    #: Operator overload to its implementation in ATen.
    decompositions: Mapping[Any, Callable[..., Any]] = field(default_factory=ops.decompositions)

    def apply(self, graph: Graph) -> Graph:
        """Return a copy of `graph` without `mhc::` operators. Operands must have example values."""
        copy, _ = copy_graph(graph)
        for node in list(copy.nodes):
            if node.op == "call_function" and node.target in self.decompositions and _is_mhc(node):
                _replace(node, _traced(node, self.decompositions))
        return copy


@dataclass(frozen=True)
class CanonicalizeAten(Pass):
    """Write tensor methods and torch functions as ATen operations.

    before: add = torch.add(a, b); y = x.movedim(1, -1)
    after:  add = aten.add.Tensor(a, b); y = aten.permute(x, [0, 2, 1])

    Operations of ATen and of other operator libraries, higher-order operations, `getitem` and
    arithmetic on sizes stay as they are.
    """

    name: ClassVar[str] = "canonicalize-aten"

    #: ATen operations to write as others, as in `torch.export.default_decompositions()`.
    decompositions: Mapping[Any, Callable[..., Any]] = field(default_factory=dict)

    def apply(self, graph: Graph) -> Graph:
        """Return a copy of `graph` in ATen. Operands must have example values."""
        copy, _ = copy_graph(graph)
        for node in list(copy.nodes):
            if node.op == "call_function" and node.target in _OVERLOADS and len(node.args) == 2 and not node.kwargs:
                node.target = _OVERLOADS[node.target]
            elif _is_python(node):
                _replace(node, _traced(node, self.decompositions))
        return copy


@dataclass(frozen=True)
class RecomposeLayerNorms(Pass):
    """Write a decomposed layer norm as one operation again, so that it can be lifted over streams.

    before: packed = aten.native_layer_norm(x, shape, weight, bias, eps); y = packed[0]
    after:  y = torch.nn.functional.layer_norm(x, shape, weight, bias, eps)

    A norm whose statistics are read stays as it is. `CanonicalizeAten` is the inverse.
    """

    name: ClassVar[str] = "recompose-layer-norms"

    def apply(self, graph: Graph) -> Graph:
        """Return a copy of `graph` with whole layer norms."""
        copy, _ = copy_graph(graph)
        for node in list(copy.nodes):
            users = list(node.users)
            if op_name(node) == "native_layer_norm" and [_index(user) for user in users] == [0]:
                users[0].target, users[0].args = torch.nn.functional.layer_norm, node.args
                copy.erase_node(node)
        return copy


def _index(node: Node) -> Any:
    return node.args[1] if node.target is operator.getitem else None


def _is_mhc(node: Node) -> bool:
    return is_overload(node.target) and node.target.namespace == "mhc"


def _is_python(node: Node) -> bool:
    if node.op == "call_method":
        return True
    if node.op != "call_function" or is_overload(node.target) or is_higher_order(node.target):
        return False
    if node.target is operator.getitem:
        return False
    value = example_value(node)
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(part, torch.Tensor) for part in parts)  # the rest is arithmetic on sizes


def _traced(node: Node, decompositions: Mapping[Any, Callable[..., Any]]) -> Any:
    """Write the operations of `node` before it and return the result."""
    operands = node.all_input_nodes

    def compute(*values: Any) -> Any:
        known = dict(zip(operands, values, strict=True))
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), known.__getitem__)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        out = node.target(*args, **kwargs)  # type: ignore[operator]
        if not _is_mhc(node):
            return out
        return tuple(map(torch.Tensor.contiguous, out)) if isinstance(out, tuple) else out.contiguous()

    return trace_into(node.graph, compute, operands, before=node, like=node, decompositions=decompositions)


def _replace(node: Node, result: Any) -> None:
    """Replace `node` by `result`: a number, nodes, or one node, which gets its name if new."""
    fresh = isinstance(result, torch.fx.Node) and result not in node.all_input_nodes
    for user in list(node.users):
        if isinstance(result, (tuple, list)):  # every reader of a tuple is a `getitem`
            user.replace_all_uses_with(result[_index(user)])
            node.graph.erase_node(user)
        else:
            given = (user.args, user.kwargs)
            user.args, user.kwargs = torch.fx.map_arg(given, lambda old: result if old is node else old)
    node.graph.erase_node(node)
    if fresh:
        result.name = node.name
