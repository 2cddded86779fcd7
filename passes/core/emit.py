"""Writing nodes: provenance, marks, example values, and Python functions as ATen operations.

Some operations are best written as a function: an operation under `torch.func.vmap`, an `mhc::`
operator in plain ATen. `trace_into` traces the function on example values and inserts the traced
operations, so that the graph stays readable and holds nothing that a cache or an exported file
could not.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from mhc_compile.passes.analysis.op_info import example_value

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch.fx import Graph, GraphModule, Node

#: The metadata that a new node takes over from the node that it replaces or serves.
PROVENANCE = ("nn_module_stack", "stack_trace", "mhc_region")
#: The key of `Node.meta` that says what a node is to later passes. Copies of a node keep it.
_ROLE = "mhc_role"
_COPIES = "copies"


def inherit(node: Node, like: Node) -> None:
    """Give `node` the provenance of `like`, and nothing else of its metadata."""
    node.meta.update({key: like.meta[key] for key in PROVENANCE if key in like.meta})


def mark_copies(streams: Node) -> None:
    """Mark `streams` [..., n, C] as n copies of its first operand [..., 1, C]."""
    streams.meta[_ROLE] = _COPIES


def is_copies(streams: Node) -> bool:
    """Return whether `streams` [..., n, C] are n copies of its first operand [..., 1, C].

    A placeholder has no operand. It gets the marks of the copies where DDP cuts a graph after them.
    """
    return streams.op != "placeholder" and streams.meta.get(_ROLE) == _COPIES


def compute_example(op: str, target: Any, args: Any, kwargs: Any) -> Any:
    """Return what a function or method gives on example values, or None if an operand has none."""
    operands: list[Node] = []
    torch.fx.map_arg((args, kwargs), operands.append)
    if any(example_value(operand) is None for operand in operands):
        return None
    args, kwargs = torch.fx.map_arg((args, kwargs), example_value)
    with torch.no_grad():
        return getattr(args[0], target)(*args[1:], **kwargs) if op == "call_method" else target(*args, **kwargs)


def trace_into(
    graph: Graph,
    function: Callable[..., Any],
    operands: Sequence[Node],
    *,
    before: Node,
    like: Node,
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
) -> Any:
    """Write `function(*operands)` before `before`, as ATen operations.

    before: (nothing)
    after:  permute = aten.permute(streams, ...); pool = aten.avg_pool2d(permute, ...); ...

    Args:
        graph: where to write.
        function: takes one tensor for each operand, and is called once, on fake tensors.
        operands: nodes with example values.
        before: the node before which to write.
        like: the node whose provenance the new nodes get.
        decompositions: functions to write in place of operators, wherever they are used.

    Returns:
        The node that stands for the result, or a tuple of nodes.

    Raises:
        ValueError: the function reads a tensor that is not among its operands.
    """
    values = [example_value(operand) for operand in operands]
    for operand, value in zip(operands, values, strict=True):
        assert value is not None, f"{operand} has no example value"
    # tensors that the function creates must have the mode of the example values
    mode = next((value.fake_mode for value in values if hasattr(value, "fake_mode")), contextlib.nullcontext())
    with torch.no_grad(), mode:
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
