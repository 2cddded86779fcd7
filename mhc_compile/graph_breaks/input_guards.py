"""Guards on what arrives at a graph: versions with streams are not for a plain model, nor others.

What follows a graph break may be an add alone, which models of one class share. Their other guards
are on modules, and it has none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from mhc_compile import _torch
from mhc_compile.graph_breaks.stream_registry import noted_heads, registered_streams
from mhc_compile.passes.planning.graph_boundary import BranchInput

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.fx import GraphModule

    from mhc_compile.passes.planning.graph_boundary import StreamInput


def has_streams(value: Tensor) -> bool:
    """Return whether an activation has streams, or a branch may have begun with it."""
    return registered_streams(value) is not None or bool(noted_heads(value))


def has_no_streams(value: Tensor) -> bool:
    """Return the opposite."""
    return not has_streams(value)


def guard_plain_graph(graph_module: GraphModule, inputs: Iterable[object]) -> None:
    """Keep the version of a plain graph from activations that have streams."""
    for node, value in zip(graph_module.graph.find_nodes(op="placeholder"), inputs, strict=True):
        if not isinstance(value, Tensor) or isinstance(value, nn.Parameter) or value.dim() < 2:
            continue
        if value.is_floating_point() and has_no_streams(value):
            _torch.guard_on_input(node, has_no_streams)


def guard_tails(
    graph_module: GraphModule, inputs: Iterable[object], arrivals: Iterable[StreamInput | BranchInput]
) -> None:
    """Keep the version of a graph in which branches end from activations without streams."""
    trunks = {arrival.value for arrival in arrivals if isinstance(arrival, BranchInput)}
    for node, value in zip(graph_module.graph.find_nodes(op="placeholder"), inputs, strict=True):
        if str(node.target) in trunks and isinstance(value, Tensor) and has_streams(value):
            _torch.guard_on_input(node, has_streams)
