"""DDP, FSDP and pipelines: what they do to a model's graphs and parameters."""

from __future__ import annotations

import functools
import sys
import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch._dynamo.backends.distributed import DDPOptimizer

from mhc_compile._torch.dynamo import _tracer, in_trace

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from types import FrameType

    from torch.nn.parallel import DistributedDataParallel


__all__ = [
    "caller",
    "ddp_parameters",
    "fsdp_hooks",
    "is_sharded",
    "pipeline_stage",
    "placements",
    "rewrite_before_ddp_splits",
    "split_as_ddp_would",
    "whole_graphs",
]

T = TypeVar("T")

#: The optimizer of DDP's graphs that waits for the rewritten graph, while a backend of ours works
#: on the whole one.
_ddp_optimizer: ContextVar[DDPOptimizer | None] = ContextVar("mhc_ddp_optimizer", default=None)


_split: Callable[..., Any] = DDPOptimizer.compile_fn

#: The backends that get whole graphs, and the lock of the patch that asks for them.
_whole_graph_backends: list[Callable[..., Any]] = []
_lock = threading.Lock()


def rewrite_before_ddp_splits(backend: Callable[..., Any]) -> None:
    """Patch Dynamo to give `backend` the whole graph of a model in DDP; other backends get pieces.

    Under `DistributedDataParallel` Dynamo splits a graph into one piece for each bucket of
    gradients and calls the backend for each piece, so that buckets are reduced while the backward
    still runs. `backend` is called once instead, with the inputs that Dynamo traced, and splits its
    own result by `split_as_ddp_would`. Repeated calls change nothing.
    """
    with _lock:
        if not any(known is backend for known in _whole_graph_backends):
            _whole_graph_backends.append(backend)
        if vars(DDPOptimizer)["compile_fn"] is not _compile_whole:
            DDPOptimizer.compile_fn = _compile_whole  # type: ignore[assignment, method-assign]


@functools.wraps(_split)
def _compile_whole(self: DDPOptimizer, graph_module: torch.fx.GraphModule, inputs: list[Any], **settings: Any) -> Any:
    innermost = _innermost(self.backend_compile_fn)
    if not any(known is innermost for known in _whole_graph_backends):
        return _split(self, graph_module, inputs, **settings)
    token = _ddp_optimizer.set(self)
    try:
        return self.backend_compile_fn(graph_module, inputs, **settings)
    finally:
        _ddp_optimizer.reset(token)


def _innermost(backend: Any) -> Any:
    """The function behind the objects that `torch.compile` and its users wrap around a backend."""
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
    """Compiles a graph: in pieces where the model is in DDP and Dynamo is told to overlap its reductions, else as one."""
    optimizer = _ddp_optimizer.get()
    if optimizer is None:
        return compiler(graph_module, inputs)  # type: ignore[no-any-return]
    pieces = DDPOptimizer(optimizer.bucket_bytes_cap, compiler, optimizer.first_bucket_cap)
    return _split(pieces, graph_module, inputs)  # type: ignore[no-any-return]


def whole_graphs() -> AbstractContextManager[None]:
    """In this context Dynamo does not cut the graphs of models in DDP."""
    return torch._dynamo.config.patch(optimize_ddp=False)  # type: ignore[no-any-return]


def caller(kind: type[T]) -> T | None:
    """The nearest object of class `kind` whose method is running, Python's stack and the frame that Dynamo traces taken together."""
    me = _tracer().output.local_scope.get("self") if in_trace() else None
    source = sys.modules[kind.__module__].__file__
    frame: FrameType | None = sys._getframe(1)
    while not isinstance(me, kind) and frame is not None:
        # looking at the locals of any other frame would keep them alive
        if frame.f_code.co_filename == source:
            me = frame.f_locals.get("self")
        frame = frame.f_back
    return me if isinstance(me, kind) else None


def ddp_parameters(ddp: DistributedDataParallel) -> set[int]:
    """`id` of every parameter that `ddp` found in its module when it was built."""
    return {id(parameter) for parameter in ddp._module_parameters} | {
        id(parameter) for parameter in ddp.parameters() if getattr(parameter, "_ddp_ignored", False)
    }


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP manages the parameters of this module, in whichever group."""
    return bool(getattr(module, "_is_fsdp_managed_module", False))


def placements(value: Any) -> tuple[Any, ...] | None:
    """How a DTensor is laid out over ranks; None for any other value."""
    module = sys.modules.get("torch.distributed.tensor")  # whoever has DTensors has loaded it
    return value.placements if module is not None and isinstance(value, module.DTensor) else None


def fsdp_hooks(module: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What FSDP does before and after the forward of `module`, one to which `fully_shard` was applied."""
    state = module._get_fsdp_state()
    return state._pre_forward, state._post_forward


def pipeline_stage() -> tuple[int, int] | None:
    """Number of the pipeline stage whose submodule is being traced, and how many there are; None outside pipelines of several stages."""
    module = sys.modules.get("torch.distributed.pipelining.stage")
    stage = caller(module.PipelineStage) if module is not None else None
    return (stage.stage_index, stage.num_stages) if stage is not None and stage.num_stages > 1 else None
