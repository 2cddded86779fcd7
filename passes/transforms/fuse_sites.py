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
_SHIFTED_STEP = torch.ops.mhc.shifted_step.default
_MIX_READ = torch.ops.mhc.mix_read.default
_CLOSE = torch.ops.mhc.close.default
#: Operators that end a site and read the new streams for the next.
STEPS = (_STEP, _SHIFTED_STEP, _MIX_READ)
#: Operators that take n equal streams as one, [..., 1, C].
_FOLDING = (_READ, *STEPS, _CLOSE)


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

    In a single pass h1 has the weights `pre`, which are known before S1, and static coefficients
    are known before as well, because they read no more of S1 than its shape:

            S1, h1, pre1, post1, res1, ... = mhc.shifted_step(X, y, post, res, pre, ...)
            pre1, post1, res1, _ = mhc.coefficients(S0, ...)
            S1, h1 = mhc.mix_read(X, y, post, res, pre1)

    The first site of a single pass has no fused operator: h is x, and its coefficients write the n
    copies and read them, (2 n + 1) C elements a token, where `mhc.read` reads C and writes C. The
    last collapse of its chain, by the last `pre`, becomes a `mix_read` whose streams are written,
    n C elements, and not read.

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
        modes = gradient_modes(copy)
        for node in list(copy.nodes):
            if node.target is _COEFFICIENTS:
                _read_old_shape(node, modes)
        for node in list(copy.nodes):
            if node.target is _COLLAPSE:
                _fuse_read(copy, node, modes)
        for node in list(copy.nodes):
            if op_name(node) == "mean":
                _fuse_close(copy, node)
        _fold_copies(copy)
        return copy


def gradient_modes(graph: Graph) -> dict[Node, int]:
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


def _is_static(coefficients: Node) -> bool:
    """Return whether coefficients have no projection: they read their streams for the shape."""
    phi = tensor_value(coefficients.args[1])  # type: ignore[arg-type]
    return phi is not None and phi.shape[1] == 0


def _read_old_shape(coefficients: Node, modes: dict[Node, int]) -> None:
    """Let static coefficients of new streams read the old ones, and move them before the update."""
    update: Any = coefficients.args[0]
    if not _is_static(coefficients) or update.target is not _UPDATE or modes[update] != modes[coefficients]:
        return
    _bring(coefficients.args[1:4], update)
    coefficients.update_arg(0, update.args[0])
    for node in (coefficients, *(user for user in coefficients.users if user.target is operator.getitem)):
        update.prepend(node)


def _bring(parameters: Any, update: Node) -> None:
    """Move parameters that are attributes before `update`; they have no operands."""
    for parameter in parameters:
        if parameter.op == "get_attr" and parameter > update:
            update.prepend(parameter)


def _fusible(streams: Any, pre: Any, modes: dict[Node, int], mode: int) -> tuple[Node, dict[int, Node]] | None:
    """Return coefficients of `streams` that a fused operator computes, and their readers by index.

    Those that `pre` is a part of come first.
    """
    found = [user for user in streams.users if user.target is _COEFFICIENTS and modes[user] == mode]
    for node in sorted(found, key=lambda node: pre not in node.users):
        parts = _parts(node)
        if parts is not None and 3 not in parts and ops.is_fused(str(node.args[4])) and not _is_static(node):
            return node, parts
    return None


def _fuse_read(graph: Graph, collapse: Node, modes: dict[Node, int]) -> None:
    """Fuse a collapse with the coefficients of its streams, and both with the update before them.

    It reads with the weights of those coefficients, or with weights that are known before the
    update. The latter need no coefficients that a fused operator computes.
    """
    streams, pre = collapse.args
    update: Any = streams if streams.target is _UPDATE and modes[streams] == modes[collapse] else None  # type: ignore[union-attr, index]
    coefficients, parts = _fusible(streams, pre, modes, modes[collapse]) or (None, {})
    _, *site = coefficients.args if coefficients is not None else (None,)
    value = tensor_value(streams)  # type: ignore[arg-type]
    args: tuple[Any, ...]
    if site and parts.get(0) is pre and list(pre.users) == [collapse] and value is not None:  # type: ignore[union-attr]
        own = (streams, *site[:3], value.shape[-2], *site[3:])
        target, args = (_READ, own) if update is None else (_STEP, (*update.args, *site))
    elif update is not None and pre < update:
        target, args = (_SHIFTED_STEP if site else _MIX_READ), (*update.args, pre, *site)
    else:
        return
    if update is not None:
        _bring(site[:3], update)
    fused = _emit(graph, update or coefficients, target, args)  # type: ignore[arg-type]
    results = (*(() if update is None else (update,)), collapse, *(parts.get(index) for index in range(3)))
    for index, node in enumerate(results):
        if node is not None:
            _replace(graph, node, _part(graph, fused, index))
    if coefficients is not None:
        graph.erase_node(coefficients)
    for part in list(fused.users):
        if not part.users:
            graph.erase_node(part)


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
