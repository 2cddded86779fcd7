"""Modes and transforms under which Dynamo traces nothing: vmap, grad, make_fx, jit.trace, modes.

`suspend_modes` takes them off, so that Dynamo can trace a model, and puts them on again while the
rewritten graph runs. Dynamo then sees plain tensors (`stand_in`) for the wrapped ones.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import (
    temporarily_clear_interpreter_stack,
    temporarily_restore_interpreter_stack,
)
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx import _symbolic_trace
from torch.nn.modules import module as _module
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import _disable_current_modes, _pop_mode, _push_mode

from mhc_compile._torch.dynamo import example_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

#: By this flag Dynamo knows of dispatch modes.
_IN_MODE = "_is_in_any_mode_without_ignore_compile_internals"


def modes_are_active() -> bool:
    """Return whether a functorch transform, a dispatch mode or `jit.trace` is active."""
    return (
        under_functorch()
        or torch._C._len_torch_dispatch_stack() > 0
        or _len_torch_dispatch_stack_pre_dispatch() > 0
        or torch._C._get_tracing_state() is not None
    )


def under_functorch() -> bool:
    """Return whether a functorch transform (vmap, grad, jvp, ...) is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


@contextlib.contextmanager
def suspend_modes() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Take all modes off in this context; yield a context that puts them on for a while.

    Global hooks of modules, which are made for calls of modules, do not run.
    """
    tracing = torch._C._get_tracing_state(), _symbolic_trace._is_fx_tracing_flag, getattr(_python_dispatch, _IN_MODE)

    def trace(state: Any, symbolic: bool, in_mode: bool) -> None:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]
        _symbolic_trace._is_fx_tracing_flag = symbolic
        setattr(_python_dispatch, _IN_MODE, in_mode)

    # Those of trackers (FlopCounterMode's) would break the graph at every module.
    hooks = [(kind, dict(kind)) for kind in (_module._global_forward_pre_hooks, _module._global_forward_hooks)]
    for kind, _ in hooks:
        kind.clear()
    trace(None, False, False)
    try:
        with _disable_current_modes() as modes, temporarily_clear_interpreter_stack() as levels:

            @contextlib.contextmanager
            def resume() -> Iterator[None]:
                for mode in reversed(modes):
                    _push_mode(mode)
                trace(*tracing)
                try:
                    with temporarily_restore_interpreter_stack(levels):
                        yield
                finally:
                    trace(None, False, False)
                    for mode in modes:
                        _pop_mode(mode._mode_key if hasattr(mode, "_mode_key") else None)

            yield resume
    finally:
        trace(*tracing)
        for kind, registered in hooks:
            kind.update(registered)


def needs_stand_in(value: object) -> bool:
    """Return whether a tensor has no values of its own for Dynamo to trace with."""
    return isinstance(value, Tensor) and (
        isinstance(value, (FakeTensor, FunctionalTensor)) or torch._C._functorch.is_functorch_wrapped_tensor(value)
    )


def address(tensor: Tensor) -> int:
    """Return the address of a tensor's data; 0 for a wrapper of other tensors."""
    return 0 if needs_stand_in(tensor) else tensor.data_ptr()


def stand_in_for(value: Tensor) -> Callable[[], Tensor]:
    """Read the metadata of a wrapped tensor; return what makes a plain tensor with them.

    Sizes that are symbolic stay dynamic in graphs.
    """
    sizes: list[Any] = list(value.shape)
    dtype, device, grad = value.dtype, value.device, value.requires_grad
    kind = type(value) if isinstance(value, nn.Parameter) else Tensor

    def make() -> Tensor:
        numbers = [example_size(size) for size in sizes]
        plain = torch.empty(numbers, dtype=dtype, device=device)
        plain = nn.Parameter(plain, grad) if kind is not Tensor else plain.requires_grad_(grad)
        for axis, size in enumerate(sizes):
            if isinstance(size, torch.SymInt):
                torch._dynamo.mark_dynamic(plain, axis)
        return plain

    return make
