"""Optimizers and averaged models that keep or do more than torch documents."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

from torch.optim.swa_utils import AveragedModel

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import nn

__all__ = ["before_averaging", "lbfgs_has_memory", "restart_lbfgs"]

_update: Callable[..., Any] = AveragedModel.update_parameters
_before_update: list[Callable[[AveragedModel, nn.Module], None]] = []
_lock = threading.Lock()


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
    """Clear its vectors before its parameters change. Not in the middle of a step."""
    if lbfgs_has_memory(optimizer):
        optimizer.state.clear()
    optimizer._numel_cache = None
