"""Launches of kernels: directly, in Triton's interpreter, or noted down to be compiled ahead.

`torch.library.wrap_triton` is for kernels that a compiler traces. The operators are opaque, and
outside a trace it runs a higher-order operator at each launch and keeps its constants for ever.
"""

from __future__ import annotations

import contextlib
import contextvars
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterator

    from torch import Tensor


class Launch(NamedTuple):
    """A launch: `kernel[grid](*arguments, **constants)`."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


#: Threads that compile kernels. The first launch waits for them: it would compile its own again.
COMPILING: list[threading.Thread] = []
#: Where launches are noted instead of run. Other threads, as those of a backward, go on running.
_NOTED: contextvars.ContextVar[list[Launch] | None] = contextvars.ContextVar("noted", default=None)


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter (`TRITON_INTERPRET=1`), on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


@contextlib.contextmanager
def noted() -> Iterator[list[Launch]]:
    """Note launches down instead of running them: operators then take tensors on "meta"."""
    launches: list[Launch] = []
    token = _NOTED.set(launches)
    try:
        yield launches
    finally:
        _NOTED.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run `kernel` on the device of its first argument, a tensor. An empty grid runs nothing.

    Triton launches on the current device, which need not be that of the tensors.
    """
    noting = _NOTED.get()
    if noting is not None:
        noting.append(Launch(kernel, grid, arguments, constants))
    elif all(grid):
        while COMPILING:
            COMPILING.pop().join()
        with _on(arguments[0]):
            kernel[grid](*arguments, **constants)


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)
