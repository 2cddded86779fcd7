"""A model's state, put back after a call that was only to look."""

from __future__ import annotations

import contextlib
import random
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["undisturbed"]


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Calls inside leave no trace: buffers (statistics of batch norm), modes and the random numbers of torch, Python and NumPy are put back.

    Nothing is differentiated, so that parameters and gradients stay as they are. A buffer that did not change is not written to.
    """
    numpy: Any = sys.modules.get("numpy")
    python, arrays = random.getstate(), numpy.random.get_state() if numpy is not None else None
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    buffers = [
        (module, name, value, value.detach().clone() if value is not None else None)
        for module in modules
        for name, value in module._buffers.items()
    ]
    tensors = (*model.parameters(), *model.buffers())
    devices = sorted({value.device.index for value in tensors if value.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for module, name, value, before in buffers:
                module._buffers[name] = value
                if value is not None and before is not None and not _same(value, before):
                    value.copy_(before)
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(arrays)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())
