"""The operators on CPU in the code that Inductor writes: calls of kernels without a dispatcher.

`torch.ops.mhc.step` checks, casts, allocates and calls in Python, which costs as much as the work
on some hundred tokens. In compiled code Inductor casts where it has to, allocates the results, with
memory that it has freed, and the call is one of `binding.h`. Where there is no kernel, the operator
is called.
"""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from mhc_compile import _torch
from mhc_compile.ops.cpu.operators import OPERATORS

if TYPE_CHECKING:
    from collections.abc import Callable

    from mhc_compile.ops.cpu.operators import Operator

_IMPORTS = (
    "from mhc_compile.ops.cpu.build import threads_for as mhc_threads",
    "from mhc_compile.ops.cpu.kernels import function as mhc_function",
)


def externs() -> dict[Any, Callable[..., _torch.Extern | None]]:
    """Return, by operator overload, what gives Inductor the call of a kernel or None."""
    # Inductor decomposes mhc::update.
    return {
        getattr(torch.ops.mhc, name).default: _planned(operator)
        for name, operator in OPERATORS.items()
        if name != "update"
    }


def _planned(operator: Operator) -> Callable[..., _torch.Extern | None]:
    """Return what makes a call of the kernel from the operator's arguments in Inductor's form."""

    def plan(*args: Any, **named: Any) -> _torch.Extern | None:
        given = {**operator.by_name(args), **named}
        if given["streams"].get_device().type != "cpu" or 0 in given["streams"].get_size():
            return None
        call = operator.call({key: _described(value) for key, value in given.items()})
        if call is None:
            return None
        arguments = ", ".join(map(repr, call.kernel))
        name = f"mhc_{operator.name}_{hashlib.sha256(arguments.encode()).hexdigest()[:8]}"
        return _torch.Extern(
            name,
            (*_IMPORTS, f"{name} = mhc_function({arguments})"),
            [(given[key], dtype) for key, dtype in call.dtypes.items()],
            [call.dtypes[key] for key in operator.differentiated] if operator.is_backward else None,
            (*call.integers, ("mhc_threads", call.integers[0]), *call.reals),
        )

    return plan


def _described(value: Any) -> Any:
    """Return dtype and shape of a tensor in Inductor's form, of each in a list, or `value`."""
    if isinstance(value, list):
        return [_described(one) for one in value]
    return SimpleNamespace(dtype=value.get_dtype(), shape=value.get_size()) if hasattr(value, "get_dtype") else value
