"""The inner compiler "eager", for debugging: the rewritten graph as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint, noop_context_fn

from mhc_compile._torch import checkpoint_context

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["run_eagerly"]


def run_eagerly(graph_module: fx.GraphModule) -> Callable[..., Any]:
    """The graph module itself, with checkpointed regions that draw their random numbers a second time as they drew them first.

    torch's own backend "eager" runs `tag_activation_checkpoint` without keeping the state of the random number generator, which it leaves to the
    partitioner of AOTAutograd: dropout in a region then has another mask in the backward, and gradients are wrong. The graph module and its bodies
    are changed in place.
    """
    for module in graph_module.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.find_nodes(
                op="call_function", target=torch.ops.higher_order.tag_activation_checkpoint
            ):
                node.target = _checkpoint
            module.recompile()
    return graph_module


def _checkpoint(body: fx.GraphModule, *args: Any, use_reentrant: bool = False, **settings: Any) -> Any:  # noqa: ARG001 - torch, too, ignores it here
    context = checkpoint_context(body) or noop_context_fn
    return checkpoint(body, *args, use_reentrant=False, context_fn=context, **settings)
