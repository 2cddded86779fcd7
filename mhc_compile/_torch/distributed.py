"""DDP, FSDP and pipelines: what they do to a model's graphs and parameters."""

from __future__ import annotations

import functools
import sys
import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._dynamo.backends.distributed import DDPOptimizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from torch.nn.parallel import DistributedDataParallel


#: The optimizer of DDP's graphs that waits for the rewritten graph, while this package's backend
#: works on the whole one.
_ddp_optimizer: ContextVar[DDPOptimizer | None] = ContextVar("mhc_ddp_optimizer", default=None)
_split: Callable[..., Any] = DDPOptimizer.compile_fn
_lock = threading.Lock()


def rewrite_before_ddp_splits() -> None:
    """Patch Dynamo to give backends with `takes_whole_graphs = True` whole graphs of DDP models.

    Dynamo splits a graph into one piece for each bucket of gradients and calls the backend for each
    piece, so that buckets are reduced while the backward still runs. Such a backend is called once
    instead, and splits its own result by `split_as_ddp_would`. Repeated calls change nothing.
    """
    with _lock:
        if vars(DDPOptimizer)["compile_fn"] is not _compile_whole:
            DDPOptimizer.compile_fn = _compile_whole  # type: ignore[assignment, method-assign]


@functools.wraps(_split)
def _compile_whole(self: DDPOptimizer, graph_module: torch.fx.GraphModule, inputs: list[Any], **settings: Any) -> Any:
    if not getattr(_innermost(self.backend_compile_fn), "takes_whole_graphs", False):
        return _split(self, graph_module, inputs, **settings)
    token = _ddp_optimizer.set(self)
    try:
        return self.backend_compile_fn(graph_module, inputs, **settings)
    finally:
        _ddp_optimizer.reset(token)


def _innermost(backend: Any) -> Any:
    """Return the function inside the objects that wrap a backend."""
    while True:
        if isinstance(backend, functools.partial):
            backend = backend.func
        elif "_torchdynamo_orig_backend" in getattr(backend, "__dict__", {}):
            backend = backend._torchdynamo_orig_backend
        elif isinstance(backend, torch._TorchCompileWrapper):
            backend = backend.compiler_fn
        else:
            return backend


def split_as_ddp_would(
    graph_module: torch.fx.GraphModule, inputs: list[Any], compiler: Callable[..., Any]
) -> Callable[..., Any]:
    """Compile a graph: in DDP's pieces, whose reductions overlap the backward, else as one."""
    optimizer = _ddp_optimizer.get()
    if optimizer is None:
        return compiler(graph_module, inputs)  # type: ignore[no-any-return]
    pieces = DDPOptimizer(optimizer.bucket_bytes_cap, compiler, optimizer.first_bucket_cap)
    return _split(pieces, graph_module, inputs)  # type: ignore[no-any-return]


def whole_graphs() -> AbstractContextManager[None]:
    """Return a context in which Dynamo does not cut the graphs of models in DDP."""
    return torch._dynamo.config.patch(optimize_ddp=False)  # type: ignore[no-any-return]


def ddp_parameters(ddp: DistributedDataParallel) -> set[int]:
    """Return the `id` of every parameter that `ddp` found in its module when it was built."""
    ignored = (parameter for parameter in ddp.parameters() if getattr(parameter, "_ddp_ignored", False))
    return {id(parameter) for parameter in (*ddp._module_parameters, *ignored)}


def is_sharded(module: nn.Module) -> bool:
    """Return whether FSDP manages the parameters of this module."""
    return bool(getattr(module, "_is_fsdp_managed_module", False))


def placements(value: Any) -> tuple[Any, ...] | None:
    """Return the placements of a DTensor over ranks; None for any other value."""
    module = sys.modules.get("torch.distributed.tensor")  # a DTensor exists only once it is loaded
    return value.placements if module is not None and isinstance(value, module.DTensor) else None


def fsdp_hooks(module: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return what FSDP does before and after the forward of a module under `fully_shard`."""
    state = module._get_fsdp_state()
    return state._pre_forward, state._post_forward


def pipeline_stage(owner: Any) -> tuple[int, int] | None:
    """Return number and count of a pipeline's stages; None for other objects and for one stage."""
    module = sys.modules.get("torch.distributed.pipelining.stage")
    if module is None or not isinstance(owner, module.PipelineStage) or owner.num_stages <= 1:
        return None
    return owner.stage_index, owner.num_stages
