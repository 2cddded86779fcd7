"""Private names of torch that setting a default backend needs. Torch is there already; nothing more of it is imported than the script asks for."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

__all__ = ["REGISTRY", "captured_graphs", "give_compile_a_default", "has_default_backend"]

#: The module that keeps the default backend (torch 2.13). It is loaded by the first `torch.compile`, together with the whole of Dynamo, which a
#: script that only imports torch need not wait for.
REGISTRY = "torch._dynamo.backends.registry"


def has_default_backend(torch: ModuleType) -> bool:
    """Whether this torch can be told a default backend."""
    return hasattr(torch.compiler, "set_default_backend")


def give_compile_a_default(torch: ModuleType, backend: Callable[..., Any]) -> None:
    """For a torch that cannot be told: `torch.compile` with another default for `backend`. `nn.Module.compile` looks it up there at each call."""
    plain = torch.compile

    @functools.wraps(plain)
    def compile(model: Any = None, **settings: Any) -> Any:  # noqa: A001 - torch's name
        if settings.get("backend") is None:
            settings["backend"] = backend
        return plain(model, **settings)

    setattr(torch, "compile", compile)  # noqa: B010 - mypy would compare the signatures


def captured_graphs() -> int:
    """How many graphs Dynamo has captured in this process, for whatever backend; 0 where it was never loaded."""
    utils = sys.modules.get("torch._dynamo.utils")
    return int(utils.counters["stats"]["unique_graphs"]) if utils is not None else 0
