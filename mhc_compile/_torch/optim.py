"""Optimizers and averaged models that keep or do more than torch documents."""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import sys
import threading
import time
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


log = logging.getLogger(__name__)

_lock = threading.Lock()
#: Every optimizer that exists, once `living_optimizers` was called.
_living: weakref.WeakSet[Optimizer] | None = None
_patch_step: Callable[[Optimizer], None] = Optimizer._patch_step_function


def living_optimizers() -> list[Optimizer]:
    """Return every optimizer that exists. The first call patches `Optimizer` to record new ones.

    It finds those that exist already with the garbage collector.
    """
    global _living
    with _lock:
        if _living is None:
            _living = weakref.WeakSet()
            Optimizer._patch_step_function = _recorded  # type: ignore[method-assign]
            begun = time.perf_counter()
            for found in gc.get_objects():
                # `vars`: the groups of a wrapper may be a property, and what it wraps is found too
                if issubclass(type(found), Optimizer) and "param_groups" in vars(found):
                    _living.add(found)
            log.debug("found %d optimizers in %.0f ms", len(_living), 1e3 * (time.perf_counter() - begun))
        return [optimizer for optimizer in _living if "param_groups" in vars(optimizer)]


@functools.wraps(_patch_step)
def _recorded(self: Optimizer) -> None:
    """Record an optimizer that is made or unpickled."""
    if _living is not None:
        _living.add(self)
    _patch_step(self)


def _before(kind: type, name: str, hook: Callable[..., None]) -> None:
    """Patch a method to call `hook` with the same arguments before, once."""
    with _lock:
        plain = getattr(kind, name)
        if hasattr(plain, "_mhc_hook"):
            return

        @functools.wraps(plain)
        def method(*args: Any, **kwargs: Any) -> Any:
            hook(*args, **kwargs)
            return plain(*args, **kwargs)

        method._mhc_hook = hook  # type: ignore[attr-defined]
        setattr(kind, name, method)


def before_averaging(hook: Callable[[AveragedModel, nn.Module], None]) -> None:
    """Patch `AveragedModel` to call `hook(averaged, model)` before each update, once."""
    _before(AveragedModel, "update_parameters", hook)


def lbfgs_has_memory(optimizer: torch.optim.LBFGS) -> bool:
    """Return whether the optimizer holds flat vectors as long as all its parameters together."""
    return any(state.get("n_iter") for state in optimizer.state.values())


def restart_lbfgs(optimizer: torch.optim.LBFGS) -> None:
    """Clear the flat vectors before parameters change. Not in the middle of a step."""
    if lbfgs_has_memory(optimizer):
        optimizer.state.clear()
    optimizer._numel_cache = None


def before_adding_group(hook: Callable[[Optimizer, list[torch.Tensor]], None]) -> None:
    """Patch `Optimizer` to call `hook(optimizer, parameters)` before each new group, once."""

    def read(optimizer: Optimizer, param_group: dict[str, Any]) -> None:
        given = param_group.get("params") if isinstance(param_group, dict) else None
        if isinstance(given, Iterator):  # read once, here
            given = param_group["params"] = list(given)
        if isinstance(given, Iterable):  # one tensor as well: its rows are in no group
            pairs = (one[1] if isinstance(one, tuple) and len(one) == 2 else one for one in given)
            tensors = [given] if isinstance(given, torch.Tensor) else [p for p in pairs if isinstance(p, torch.Tensor)]
            hook(optimizer, tensors)

    _before(Optimizer, "add_param_group", read)


def before_loading_state(hook: Callable[[Optimizer], None]) -> None:
    """Patch `Optimizer.load_state_dict` to call `hook(optimizer)` before, once."""
    _before(Optimizer, "load_state_dict", lambda optimizer, *_, **__: hook(optimizer))


def steps_in_backward(optimizer: Optimizer) -> bool:
    """Return whether hooks on the gradients of its parameters make the optimizer's steps.

    All parameters have such hooks, and one refers to the optimizer or is its only parameter's; or
    torch's own `_apply_optimizer_in_backward` made it.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(optimizer is one for p in parameters[:1] for one in getattr(p, "_in_backward_optimizers", ())):
        return True
    hooks = [hook for p in parameters[:1] for hook in (p._post_accumulate_grad_hooks or {}).values()]
    if not hooks or not all(parameter._post_accumulate_grad_hooks for parameter in parameters):
        return False
    return len(parameters) == 1 or any(_refers(hook, optimizer) for hook in hooks)


def _refers(hook: Any, optimizer: Optimizer) -> bool:
    """Return whether a function's variables are the optimizer or a container that holds it."""
    function = getattr(hook, "func", getattr(hook, "__func__", hook))
    values = [*getattr(hook, "args", ()), *vars(getattr(hook, "__self__", object)).values()]
    if isinstance(function, types.FunctionType):
        known = inspect.getclosurevars(function)
        values += [*known.nonlocals.values(), *known.globals.values(), *(function.__defaults__ or ())]
    held = [one for value in values for one in _held(value)]
    return any(one is optimizer for one in (*values, *held))


def _held(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else list(value) if isinstance(value, list | tuple) else []


def local_optimizer(optimizer: Optimizer) -> Optimizer | None:
    """Return the optimizer of this process's share in a `ZeroRedundancyOptimizer`, else None."""
    return getattr(optimizer, "optim", None) if _divides(optimizer) else None


def can_grow(optimizer: Optimizer) -> bool:
    """Return whether parameters can join: not after a step of a `ZeroRedundancyOptimizer`."""
    if not _divides(optimizer):
        return True
    return not optimizer._overlap_with_ddp and not optimizer.optim.state  # type: ignore[attr-defined]


def partition(optimizer: Optimizer) -> None:
    """Divide the parameters of a `ZeroRedundancyOptimizer` among processes again.

    It waits for no other process: each divides the same list in the same way.
    """
    if _divides(optimizer):
        zero: Any = optimizer
        zero._clear_cache()
        zero._all_params = [parameter for group in zero.param_groups for parameter in group["params"]]
        zero._is_trainable_mask = zero._get_is_trainable_mask()
        zero._init_local_optimizer()
        zero._build_param_buckets()


def _divides(optimizer: Optimizer) -> bool:
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")  # not imported for this
    return module is not None and isinstance(optimizer, module.ZeroRedundancyOptimizer)
