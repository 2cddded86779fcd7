"""Optimizers and averaged models that keep or do more than torch documents."""

from __future__ import annotations

import functools
import gc
import logging
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn


log = logging.getLogger(__name__)

_lock = threading.Lock()
#: Every optimizer that exists, once `living_optimizers` was called.
_living: weakref.WeakSet[Optimizer] | None = None
_patch_step: Callable[[Optimizer], None] = Optimizer._patch_step_function
_update: Callable[..., Any] = AveragedModel.update_parameters
_before_update: list[Callable[[AveragedModel, nn.Module], None]] = []


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


def before_averaging(hook: Callable[[AveragedModel, nn.Module], None]) -> None:
    """Patch `AveragedModel` to call `hook(averaged, model)` before each update, once."""
    with _lock:
        if hook not in _before_update:
            _before_update.append(hook)
        if AveragedModel.update_parameters is not _update_parameters:
            AveragedModel.update_parameters = _update_parameters  # type: ignore[method-assign]


@functools.wraps(_update)
def _update_parameters(self: AveragedModel, model: nn.Module) -> Any:
    for hook in _before_update:
        hook(self, model)
    return _update(self, model)


def lbfgs_has_memory(optimizer: torch.optim.LBFGS) -> bool:
    """Return whether the optimizer holds flat vectors as long as all its parameters together."""
    return any(state.get("n_iter") for state in optimizer.state.values())


def restart_lbfgs(optimizer: torch.optim.LBFGS) -> None:
    """Clear the flat vectors before parameters change. Not in the middle of a step."""
    if lbfgs_has_memory(optimizer):
        optimizer.state.clear()
    optimizer._numel_cache = None
