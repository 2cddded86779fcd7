"""Fuse the operators of neighbouring sites: one kernel reads the streams instead of three.

This is the last pass before a compiler. The fused operators compute the same numbers
(`mhc_compile.ops.fused_reference`); their kernels are in `mhc_compile.ops.cpu` and
`mhc_compile.ops.triton`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from mhc_compile import ops
from mhc_compile._torch import operator_name
from mhc_compile.passes.analysis.op_info import op_name, sets_grad_mode, tensor_value
from mhc_compile.passes.core.emit import compute_example, inherit, is_copies
from mhc_compile.passes.core.pass_base import Pass, copy_graph

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.fx import Graph, Node

_COEFFICIENTS = torch.ops.mhc.coefficients.default
_COLLAPSE = torch.ops.mhc.collapse.default
_UPDATE = torch.ops.mhc.update.default
_READ = torch.ops.mhc.read.default
_STEP = torch.ops.mhc.step.default
_CLOSE = torch.ops.mhc.close.default
#: Operators that take n equal streams as one, [..., 1, C].
_FOLDING = (_READ, _STEP, _CLOSE)


@dataclass(frozen=True)
class FuseSites(Pass):
    """Fuse update, coefficients and collapse of neighbouring sites, with copies and means.

    before: S0 = x.unsqueeze(-2).expand(-1, -1, 4, -1)
            pre, post, res, _ = mhc.coefficients(S0, ...); h = mhc.collapse(S0, pre); y = f(h)
            S1 = mhc.update(S0, y, post, res)
            pre1, post1, res1, _ = mhc.coefficients(S1, ...); h1 = mhc.collapse(S1, pre1)
            y1 = g(h1); S2 = mhc.update(S1, y1, post1, res1); out = S2.mean(-2)

    after:  X = x.unsqueeze(-2); h, _, post, res, ... = mhc.read(X, ...); y = f(h)
            S1, h1, _, post1, res1, ... = mhc.step(X, y, post, res, ...); y1 = g(h1)
            out = mhc.close(S1, y1, post1, res1)

    An update whose streams go through a trunk operation first (a norm after the add) stays, and so
    do the operators of a mapping that has no kernel.
    """

    name: ClassVar[str] = "fuse-sites"

    def apply(self, graph: Graph) -> Graph:
        """Return a copy of `graph` with fused operators, or the graph itself if nothing fuses."""
        targets = {node.target for node in graph.nodes}
        if _COEFFICIENTS not in targets and _UPDATE not in targets:
            return graph
        copy, _ = copy_graph(graph)
        modes = _modes(copy)
        for node in list(copy.nodes):
            if node.target is _COEFFICIENTS:
                _fuse_read(copy, node, modes)
        for node in list(copy.nodes):
            if op_name(node) == "mean":
                _fuse_close(copy, node)
        _fold_copies(copy)
        return copy


def _modes(graph: Graph) -> dict[Node, int]:
    """Return each node's section of the graph between switches of the gradient mode."""
    modes, number = {}, 0
    for node in graph.nodes:
        number += sets_grad_mode(node) is not None
        modes[node] = number
    return modes


def _parts(packed: Node) -> dict[int, Node] | None:
    """Return the readers of a tuple by index, None if one reads it whole or two the same part."""
    parts: dict[int, Node] = {}
    for user in packed.users:
        if user.target is not operator.getitem or user.args[1] in parts:
            return None
        parts[user.args[1]] = user  # type: ignore[index]
    return parts


def _fuse_read(graph: Graph, coefficients: Node, modes: dict[Node, int]) -> None:
    """Fuse coefficients and collapse to a read, and the update before them with both to a step."""
    streams, phi, bias, scale, mapping, iterations, eps = coefficients.args
    parts = _parts(coefficients)
    if not ops.is_fused(str(mapping)) or parts is None or 3 in parts or 0 not in parts:
        return
    readers = list(parts[0].users)
    if len(readers) != 1 or readers[0].target is not _COLLAPSE or readers[0].args != (streams, parts[0]):
        return
    collapse = readers[0]
    value, projection = tensor_value(streams), tensor_value(phi)  # type: ignore[arg-type]
    static = projection is not None and projection.shape[1] == 0  # needs no pass over the streams
    if static or value is None or modes[collapse] != modes[coefficients]:
        return
    settings = (mapping, iterations, eps)
    update = streams if streams.target is _UPDATE and modes[streams] == modes[coefficients] else None  # type: ignore[union-attr, index]
    if update is None:
        fused = _emit(graph, coefficients, _READ, (streams, phi, bias, scale, value.shape[-2], *settings))
        first = 0
    else:
        # attributes may stand between the two; they have no operands
        for parameter in (phi, bias, scale):
            if parameter.op == "get_attr" and parameter > update:  # type: ignore[union-attr, operator]
                update.prepend(parameter)  # type: ignore[union-attr, arg-type]
        fused = _emit(graph, update, _STEP, (*update.args, phi, bias, scale, *settings))  # type: ignore[union-attr, arg-type]
        first = 1
        _replace(graph, update, _part(graph, fused, 0))  # type: ignore[arg-type]
    for index, node in ((0, collapse), (2, parts.get(1)), (3, parts.get(2))):
        if node is not None:
            _replace(graph, node, _part(graph, fused, first + index))
    graph.erase_node(parts[0])
    graph.erase_node(coefficients)


def _fuse_close(graph: Graph, mean: Node) -> None:
    """Fuse update and mean to a close, where no other node reads the new streams."""
    streams = mean.args[0] if mean.args else None
    if mean.args[1:] != (-2,) or mean.kwargs or getattr(streams, "target", None) is not _UPDATE:
        return
    if list(streams.users) == [mean]:  # type: ignore[union-attr]
        _replace(graph, mean, _emit(graph, mean, _CLOSE, streams.args))  # type: ignore[union-attr]
        graph.erase_node(streams)  # type: ignore[arg-type]


def _fold_copies(graph: Graph) -> None:
    """Let a fused operator that reads copies read the one value that they are copies of."""
    for node in list(graph.nodes):
        if node.target in _FOLDING and is_copies(node.args[0]):
            copies = node.args[0]
            node.update_arg(0, copies.args[0])
            if not copies.users:
                graph.erase_node(copies)


def _emit(graph: Graph, before: Node, target: Callable[..., Any], args: tuple[Any, ...]) -> Node:
    with graph.inserting_before(before):
        node = graph.create_node("call_function", target, args, {}, str(operator_name(target)).replace("::", "_"))
    return _finish(node, before)


def _part(graph: Graph, packed: Node, index: int) -> Node:
    """Write a result of `packed` after it and after its earlier results."""
    after = packed
    while after.next.target is operator.getitem and after.next.args[0] is packed:
        after = after.next
    with graph.inserting_after(after):
        return _finish(graph.call_function(operator.getitem, (packed, index)), packed)


def _finish(node: Node, like: Node) -> Node:
    inherit(node, like)
    value = compute_example(node.op, node.target, node.args, node.kwargs)
    if value is not None:
        node.meta["example_value"] = value
    return node


def _replace(graph: Graph, old: Node, new: Node) -> None:
    old.replace_all_uses_with(new)
    graph.erase_node(old)
    if new.target is operator.getitem:
        new.name = old.name
