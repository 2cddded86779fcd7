"""Sets the default backend in a Python below `mhc run`, once torch is there."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from mhc_compile._observe import observers
from mhc_compile._torch import default_backend as _torch
from mhc_compile.tools.launcher import messages
from mhc_compile.tools.launcher.default import DefaultBackend
from mhc_compile.tools.launcher.order import Order
from mhc_compile.tools.launcher.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

__all__ = ["activate", "say_last"]

_tally: Tally | None = None


def activate(torch: ModuleType, order: str, after: Callable[[str, Callable[[ModuleType], None]], Any]) -> None:
    """Makes mhc the default backend of `torch.compile`, and counts what it does.

    Args:
        torch: the module, just imported.
        order: the value of the environment variable.
        after: `after(name, then)` calls `then(module)` once the module `name` has been imported.
    """
    global _tally
    parsed = Order.load(order)
    _tally = Tally(parsed)
    observers.append(_tally.note)
    backend = DefaultBackend(parsed.options)
    if not _torch.has_default_backend(torch):
        _torch.give_compile_a_default(torch, backend)
    elif _torch.REGISTRY in sys.modules:
        torch.compiler.set_default_backend(backend)
    else:
        after(_torch.REGISTRY, lambda _: torch.compiler.set_default_backend(backend))


def say_last() -> None:
    """For the end of the process: see `messages.say_last`."""
    if _tally is not None:
        messages.say_last(_tally)
