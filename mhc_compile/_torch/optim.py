"""Optimizers that keep more than torch documents."""

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

__all__ = ["before_average_update", "lbfgs_has_memory", "living_optimizers", "restart_lbfgs"]

log = logging.getLogger(__name__)

_installing = threading.Lock()
#: Every optimizer that exists, once `living_optimizers` was called.
_living: weakref.WeakSet[Optimizer] | None = None


def living_optimizers() -> list[Optimizer]:
    """Return every optimizer that exists.

    Torch keeps no list. The first call finds those that exist with the garbage collector, and from
    then on each records itself when it is made or unpickled: `Optimizer._patch_step_function` runs in both.
    """
    global _living
    with _installing:
        if _living is None:
            _living = weakref.WeakSet()
            _record_new_optimizers(_living)
            begun = time.perf_counter()
            for found in gc.get_objects():
                # `vars`: a wrapper may have groups that are a property, and then what it wraps is found as well.
                if issubclass(type(found), Optimizer) and "param_groups" in vars(found):
                    _living.add(found)
            log.debug("found %d optimizers in %.0f ms", len(_living), 1e3 * (time.perf_counter() - begun))
        return [optimizer for optimizer in _living if "param_groups" in vars(optimizer)]


def _record_new_optimizers(living: weakref.WeakSet[Optimizer]) -> None:
    patch_step = Optimizer._patch_step_function

    @functools.wraps(patch_step)
    def _patch_step_function(self: Optimizer) -> None:
        living.add(self)
        patch_step(self)

    Optimizer._patch_step_function = _patch_step_function  # type: ignore[method-assign]


def before_average_update(prepare: Callable[[AveragedModel, nn.Module], None]) -> None:
    """Call `prepare(averaged, model)` before each `AveragedModel.update_parameters`, for which torch has no hook. Idempotent."""
    with _installing:
        update = AveragedModel.update_parameters
        if getattr(update, "prepared_by", None) is prepare:
            return

        @functools.wraps(update)
        def update_parameters(self: AveragedModel, model: nn.Module) -> Any:
            prepare(self, model)
            return update(self, model)

        update_parameters.prepared_by = prepare  # type: ignore[attr-defined]
        AveragedModel.update_parameters = update_parameters  # type: ignore[method-assign]


def lbfgs_has_memory(optimizer: torch.optim.LBFGS) -> bool:
    """Whether it holds flat vectors (directions, gradients) as long as all its parameters together."""
    return any(state.get("n_iter") for state in optimizer.state.values())


def restart_lbfgs(optimizer: torch.optim.LBFGS) -> None:
    """Makes it forget its vectors and their length, because it is about to have other parameters. Not in the middle of a step."""
    if lbfgs_has_memory(optimizer):
        optimizer.state.clear()
    optimizer._numel_cache = None
