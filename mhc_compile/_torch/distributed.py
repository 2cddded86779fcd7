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
    if not getattr(innermost_backend_of(self.backend_compile_fn), "takes_whole_graphs", False):
        return _split(self, graph_module, inputs, **settings)
    token = _ddp_optimizer.set(self)
    try:
        return self.backend_compile_fn(graph_module, inputs, **settings)
    finally:
        _ddp_optimizer.reset(token)


def innermost_backend_of(backend: Any) -> Any:
    """Return the function inside the objects that wrap a backend."""
    while True:
        if isinstance(backend, functools.partial):
            backend = backend.func
        elif "_torchdynamo_orig_backend" in getattr(backend, "__dict__", {}):
            backend = backend._torchdynamo_orig_backend
        elif isinstance(backend, torch._TorchCompileWrapper):
            backend = backend.compiler_fn
        elif isinstance(getattr(backend, "__self__", None), DDPOptimizer):
            backend = backend.__self__.backend_compile_fn
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


def late_parameters(ddp: DistributedDataParallel) -> dict[str, nn.Parameter]:
    """Return the parameters, by name, of the module of `ddp` that its reducer does not know."""
    known = {id(parameter) for parameter in ddp._module_parameters}
    late = {
        name: parameter
        for name, parameter in ddp.module.named_parameters()
        if id(parameter) not in known and name not in ddp.parameters_to_ignore
    }
    # The reducer of a copied or unpickled one has them all.
    return {} if _is_reduced(ddp, [*ddp._module_parameters, *late.values()]) else late


def _is_reduced(ddp: DistributedDataParallel, parameters: list[nn.Parameter]) -> bool:
    """Return whether the reducer was built for those of `parameters` that are trained."""
    trained = {id(parameter): parameter for parameter in parameters if parameter.requires_grad}.values()
    built = ddp._get_ddp_logging_data()
    size = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    return (built["num_parameter_tensors"], built["total_parameter_size_bytes"]) == (len(trained), size)


def obstacle_to_late_parameters(ddp: DistributedDataParallel) -> str | None:
    """Return why `reduce_late_parameters` would be wrong, None if it would be right."""
    built, parameters = ddp._get_ddp_logging_data(), ddp._module_parameters
    obstacles = {
        "torch._dynamo.config.optimize_ddp='python_reducer'": ddp._use_python_reducer,
        "its setting mixed_precision": ddp.mixed_precision is not None,
        "its setting delay_all_reduce_named_params": bool(ddp._delay_all_reduce_params),
        "an optimizer that runs in the backward": any(hasattr(p, "_in_backward_optimizers") for p in parameters),
        "a built-in communication hook": bool(built.get("comm_hook")) and not ddp._comm_hooks,
        "the context of uneven inputs, join()": ddp._join_config.enable,
        "parameters that were frozen or unfrozen since it wrapped the model": not _is_reduced(ddp, parameters),
    }
    return next((obstacle for obstacle, present in obstacles.items() if present), None)


def reduce_late_parameters(ddp: DistributedDataParallel) -> None:
    """Build the reducer of `ddp` again, as unpickling does, with all parameters of the module.

    Call it after the forward of the module and before that of `ddp` ends.
    """
    ddp._remove_autograd_hooks()
    ddp._module_parameters += late_parameters(ddp).values()
    parameters, sparse = ddp._build_params_for_reducer()
    names = ddp._build_debug_param_to_name_mapping(parameters)
    ddp._ddp_init_helper(parameters, sparse, names, ddp.static_graph)
    ddp._has_rebuilt_buckets = False
    for hook, state in ddp._comm_hooks:
        ddp.logger._set_comm_hook_name(hook.__qualname__)  # type: ignore[union-attr]
        torch.distributed._register_comm_hook(ddp.reducer, state, hook)  # type: ignore[attr-defined]
    if ddp.static_graph:
        ddp._static_graph_delay_allreduce_enqueued = False
        ddp.reducer._set_static_graph()
        ddp.logger._set_static_graph()  # type: ignore[union-attr]
    if ddp.require_backward_grad_sync:
        ddp.reducer.prepare_for_forward()  # as the forward did with the reducer before


def before_backward(ddp: DistributedDataParallel, action: Callable[[DistributedDataParallel], None]) -> None:
    """Patch `ddp` to call `action(ddp)` once, when its next forward with gradients ends.

    The reducer is made ready for the backward afterwards. All ranks come to this point together;
    a forward without gradients, such as the validation of rank 0, does not.
    """
    ddp.__dict__["_post_forward"] = functools.partial(_end_forward, ddp, action)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _end_forward(ddp: DistributedDataParallel, action: Callable[[DistributedDataParallel], None], output: Any) -> Any:
    if torch.is_grad_enabled():
        action(ddp)
        del ddp.__dict__["_post_forward"]
    return type(ddp)._post_forward(ddp, output)


def default_store() -> Any:
    """Return the key-value store by which the ranks of the default process group met."""
    return torch.distributed.distributed_c10d._get_default_store()


def is_sharded(module: nn.Module) -> bool:
    """Return whether FSDP manages the parameters of this module."""
    return bool(getattr(module, "_is_fsdp_managed_module", False))


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, without the one that `fully_shard` puts in its place."""
    kind = type(module)
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharded = fsdp is not None and fsdp.FSDPModule in kind.__bases__
    return kind.__bases__[1] if sharded else kind


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
