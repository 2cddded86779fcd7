"""The same numbers every time, on several threads too."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["deterministic"]


@contextmanager
def deterministic() -> Iterator[None]:
    """Deterministic algorithms in here, and what was set before afterwards.

    Without them Inductor adds up the gradient of an embedding with atomic additions, in the order in which the threads
    arrive: after ten steps or so two runs differ in the last bit of the loss. With them a step is as fast.
    """
    before = torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic  # its attribute is a property of a module, which mypy does not see
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = fill
