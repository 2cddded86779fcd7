"""Writes what a Python function computes into a graph, as ATen operations.

Some things are said best as a function: an operation under `torch.func.vmap`, an operator of ours in plain ATen. `splice` traces the function on
the example values of its operands and puts the traced operations where they belong, so that the graph stays a graph: readable, and made of
nothing that a cache or an exported file could not hold.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch.fx import Graph, GraphModule, Node

__all__ = ["PROVENANCE", "inherit", "trace_into"]

#: What a new node takes over from the node in whose place, or for whose sake, it is written.
PROVENANCE = ("nn_module_stack", "stack_trace", "mhc_region")


def inherit(node: Node, like: Node) -> None:
    """Gives `node` the provenance of `like`, and nothing else of its metadata."""
    node.meta.update({key: like.meta[key] for key in PROVENANCE if key in like.meta})


def trace_into(
    graph: Graph,
    function: Callable[..., Any],
    operands: Sequence[Node],
    *,
    before: Node,
    like: Node,
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
) -> Any:
    """Emits `function(*operands)` in front of `before`.

    before: (nothing)
    after:  permute = aten.permute(streams, ...); pool = aten.avg_pool2d(permute, ...); ...

    Args:
        graph: where to write.
        function: takes one tensor for each operand, returns a tensor or a tuple of tensors. It is called once, on fake tensors.
        operands: nodes with example values.
        before: the node before which to write.
        like: where the provenance of the new nodes comes from.
        decompositions: operators to write as what these functions compute, wherever the function or one of these functions uses them.

    Returns:
        The node that stands for the result, or a tuple of nodes.

    Raises:
        ValueError: the function reads a tensor that is not among its operands.
    """
    values = [_example(operand) for operand in operands]
    with torch.no_grad(), _fake_mode(values):
        traced: GraphModule = make_fx(function, decomposition_table=dict(decompositions or {}))(*values)
    traced.graph.eliminate_dead_code()
    new: dict[Node, Any] = {}
    inputs = iter(operands)
    with graph.inserting_before(before):
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                new[node] = next(inputs)
            elif node.op == "output":
                return torch.fx.map_arg(node.args[0], new.__getitem__)
            elif node.op == "get_attr":
                raise ValueError(f"{function} reads the tensor {node.target!r}, which is not among its operands")
            else:
                copy = graph.node_copy(node, new.__getitem__)
                copy.meta = {"example_value": node.meta.get("val")}
                inherit(copy, like)
                new[node] = copy
    raise AssertionError("a traced graph has an output")


def _example(node: Node) -> Any:
    value = node.meta.get("example_value", node.meta.get("val"))
    assert value is not None, f"{node} has no example value"
    return value


def _fake_mode(values: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """The mode of the example values: what the function creates anew (`torch.eye`) must be of it too."""
    return next((value.fake_mode for value in values if hasattr(value, "fake_mode")), contextlib.nullcontext())
