"""A default backend for `torch.compile`. Imports nothing of torch, which is slow to import."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

__all__ = ["REGISTRY", "captured_graphs", "give_compile_a_default", "has_default_backend"]

#: The module that holds the default backend (torch 2.13). The first `torch.compile` loads it,
#: together with all of Dynamo, for which a script that only imports torch need not wait.
REGISTRY = "torch._dynamo.backends.registry"


def has_default_backend(torch: ModuleType) -> bool:
    """Return whether this torch has a setting for the default backend."""
    return hasattr(torch.compiler, "set_default_backend")


def give_compile_a_default(torch: ModuleType, backend: Callable[..., Any]) -> None:
    """Patch `torch.compile` to use `backend` by default. Repeated calls change nothing.

    `nn.Module.compile` looks `torch.compile` up at each call.
    """
    plain = torch.compile
    if getattr(plain, "mhc_default", None) is backend:
        return

    @functools.wraps(plain)
    def compile(model: Any = None, **settings: Any) -> Any:  # noqa: A001 - torch's name
        if settings.get("backend") is None:
            settings["backend"] = backend
        return plain(model, **settings)

    compile.mhc_default = backend  # type: ignore[attr-defined]
    setattr(torch, "compile", compile)  # noqa: B010 - mypy would compare the signatures


def captured_graphs() -> int:
    """Return how many graphs Dynamo has captured in this process; 0 if it was never loaded."""
    utils = sys.modules.get("torch._dynamo.utils")
    return int(utils.counters["stats"]["unique_graphs"]) if utils is not None else 0
