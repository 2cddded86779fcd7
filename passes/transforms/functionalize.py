"""Replace in-place operations by out-of-place ones where no alias can observe the difference."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from mhc_compile._torch import is_overload, overload_like
from mhc_compile.passes.analysis.aliases import Aliases, storages
from mhc_compile.passes.analysis.op_info import (
    INPLACE_ADDS,
    INPLACE_FLAG,
    leaf_module,
    op_name,
    sets_grad_mode,
    tensor_value,
    written_operands,
)
from mhc_compile.passes.core.emit import compute_example, inherit
from mhc_compile.passes.core.pass_base import Pass, copy_graph

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.fx import Graph, Node

_OPERATORS: dict[Any, Any] = {
    getattr(operator, f"i{name}"): getattr(operator, name) for name in "add sub mul truediv pow".split()
}
#: Operations `name_` that have an out-of-place form `name` with the same arguments.
_METHODS = frozenset(
    "add sub mul div true_divide pow neg relu sigmoid tanh exp expm1 log log1p sqrt rsqrt square abs sign clamp clamp_min clamp_max clip"
    " masked_fill addcmul addcdiv lerp sin cos erf reciprocal round floor ceil relu6 leaky_relu elu hardtanh silu selu celu hardswish"
    " hardsigmoid threshold nan_to_num".split()
)
#: Activation modules with an `inplace` flag: the function, and the attributes that it takes.
_MODULES: dict[type[nn.Module], tuple[Callable[..., Any], tuple[str, ...]]] = {
    nn.ReLU: (F.relu, ()),
    nn.ReLU6: (F.relu6, ()),
    nn.SiLU: (F.silu, ()),
    nn.Mish: (F.mish, ()),
    nn.SELU: (F.selu, ()),
    nn.CELU: (F.celu, ("alpha",)),
    nn.ELU: (F.elu, ("alpha",)),
    nn.LeakyReLU: (F.leaky_relu, ("negative_slope",)),
    nn.Hardswish: (F.hardswish, ()),
    nn.Hardsigmoid: (F.hardsigmoid, ()),
    nn.Hardtanh: (F.hardtanh, ("min_val", "max_val")),
    nn.Threshold: (F.threshold, ("threshold", "value")),
}


@dataclass(frozen=True)
class FunctionalizeWrites(Pass):
    """Replace in-place operations by out-of-place ones, whose result all later readers read.

    before: add_ = y.add_(x); z = f(y)                 after: add = y.add(x); z = f(add)
    before: r = relu(y, inplace=True); z = g(r, y)     after: r = relu(y); z = g(r, r)

    Dynamo records an in-place statement without an edge to the readers that follow; this pass adds
    the edges. It changes an operation only if it knows every name of the memory that is written:
    the tensor was made in this graph, and no earlier view of it is read afterwards. A graph input
    that is added to in place is copied first and written back at the end, as its owner expects.
    Other writes (to a part of a tensor, under `no_grad`) stay, and planning rejects the additions
    that they touch as MUTATED_OPERAND.
    """

    name: ClassVar[str] = "functionalize-writes"

    def apply(self, graph: Graph) -> Graph:
        """Return a copy of `graph`, or the graph itself if nothing is written in place."""
        if not any(written_operands(node) for node in graph.nodes):
            return graph
        copy, _ = copy_graph(graph)
        _protect_inputs(copy)
        aliases = Aliases(copy)
        names: dict[Node, Node] = {}  # from a value to the first name of the same tensor
        gradients = True
        for node in list(copy.nodes):
            mode = sets_grad_mode(node)
            gradients = gradients if mode is None else mode
            targets = written_operands(node)
            if len(targets) != 1:
                continue
            same = _same_tensor(targets[0], aliases, names)
            names[node] = names.get(targets[0], targets[0])
            if gradients and _private(node, same, aliases):
                _replace(node, targets[0], same, aliases, names)
        return copy


def _protect_inputs(graph: Graph) -> None:
    """Copy the graph inputs that are added to in place, and write them back at the end.

    before: x = placeholder; iadd = operator.iadd(x, y)
    after:  x = placeholder; own = x.clone(); iadd = operator.iadd(own, y); ...; x.copy_(own)
    """
    aliases = Aliases(graph)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in inputs:
        value = tensor_value(node)
        if value is None or isinstance(value, nn.Parameter) or not value.is_floating_point() or value.dim() < 2:
            continue
        writers = aliases.writers(node)
        others = [alias for alias in aliases.of(node) if alias is not node and alias not in writers]
        if others or not any(op_name(writer) in INPLACE_ADDS and writer.args[0] is node for writer in writers):
            continue
        with torch.no_grad():
            private = value.clone()
        with graph.inserting_before(inputs[-1].next):
            own = graph.call_method("clone", (node,))
        inherit(own, writers[0])
        own.meta["example_value"] = private
        for reader in list(node.users):
            if reader is not own:
                reader.replace_input_with(node, own)
        for writer in writers:  # results of in-place operations are the tensor itself
            writer.meta["example_value"] = private
        with graph.inserting_before(graph.output_node()):
            back = graph.call_method("copy_", (node, own))
        inherit(back, writers[-1])
        back.meta["example_value"] = value


def _same_tensor(target: Node, aliases: Aliases, names: dict[Node, Node]) -> list[Node]:
    """Return the nodes that are the tensor `target`: itself, and results that are that operand."""
    root = names.get(target, target)
    value = tensor_value(target)
    return [
        node
        for node in aliases.of(target)
        if node is root or names.get(node) is root or (value is not None and tensor_value(node) is value)
    ]


def _private(node: Node, same: list[Node], aliases: Aliases) -> bool:
    """Return whether all later readers of the memory that `node` writes read a node in `same`."""
    target = written_operands(node)[0]
    if len(storages(target)) != 1:
        return False
    now = aliases.order[node]
    for alias in aliases.of(target):
        if alias.op in {"placeholder", "get_attr"}:
            return False
        if alias in same or aliases.order[alias] >= now:
            continue
        if any(aliases.order.get(user, now) > now for user in alias.users):
            return False
    return True


def _replace(node: Node, target: Node, same: list[Node], aliases: Aliases, names: dict[Node, Node]) -> None:
    value, form = tensor_value(target), _out_of_place(node)
    if form is None or value is None:
        return
    op, function, args, kwargs = form
    result = compute_example(op, function, args, kwargs)
    if not isinstance(result, torch.Tensor) or result.shape != value.shape:
        return
    graph, now = node.graph, aliases.order[node]
    with graph.inserting_before(node):
        new = graph.create_node(op, function, args, kwargs)
        new.meta = dict(node.meta)
        if result.dtype != value.dtype:
            new.meta["example_value"] = result
            new = graph.call_method("to", (new, value.dtype))
            inherit(new, node)
    new.meta["example_value"] = value
    aliases.rename(node, new)
    for name in same:
        for user in list(name.users):
            if aliases.order.get(user, -1) > now:
                user.replace_input_with(name, new)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    names[new] = names.get(target, target)


def _out_of_place(node: Node) -> tuple[str, Any, tuple[Any, ...], dict[str, Any]] | None:
    """Return opcode, target, arguments and keywords of the out-of-place form, None if unknown."""
    args, kwargs = node.args, dict(node.kwargs)
    if node.op == "call_module":
        module = leaf_module(node)
        if type(module) not in _MODULES:
            return None
        activation, attributes = _MODULES[type(module)]  # type: ignore[index]
        return "call_function", activation, (*args, *(getattr(module, name) for name in attributes)), {}
    if "out" in kwargs:
        return None
    if node.op == "call_function" and node.target in _OPERATORS:
        return "call_function", _OPERATORS[node.target], args, kwargs
    name = op_name(node)
    if name in INPLACE_FLAG:
        at = INPLACE_FLAG[name]
        kwargs.pop("inplace", None)
        kept = (*args[:at], False, *args[at + 1 :]) if len(args) > at else args
        return node.op, node.target, kept, kwargs
    base = name.removesuffix("_")
    if name in {"__iadd__", "__isub__", "__imul__"}:
        return "call_method", name.replace("__i", "").removesuffix("__"), args, kwargs
    if base not in _METHODS:
        return None
    if node.op == "call_method" and hasattr(torch.Tensor, base):
        return "call_method", base, args, kwargs
    if is_overload(node.target):
        form = overload_like(getattr(torch.ops.aten, base, None), node.target)
    else:
        form = getattr(torch, base, None) or getattr(F, base, None)
    return None if form is None else ("call_function", form, args, kwargs)
