"""The default backend of `torch.compile`, for `mhc run`, which must not import torch itself."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType


#: The module that holds the default backend (torch 2.13); the first `torch.compile` loads it.
_REGISTRY = "torch._dynamo.backends.registry"
#: The attribute of a patched `torch.compile` that holds the original.
_PLAIN = "_mhc_plain_compile"


def install_default_backend(
    torch: ModuleType,
    backend: Callable[..., Any],
    after: Callable[[str, Callable[[ModuleType], None]], Any],
    *,
    replace_inductor: bool = False,
) -> None:
    """Make `backend` the default of `torch.compile`; a second call replaces it.

    `after(name, then)` calls `then(module)` once the module `name` has been imported. With
    `replace_inductor` the backend also takes the place of a named "inductor".
    """
    if replace_inductor:
        patch_compile(torch, backend, replaced=(None, "inductor"))
    elif not hasattr(torch.compiler, "set_default_backend"):
        patch_compile(torch, backend)
    elif _REGISTRY in sys.modules:
        torch.compiler.set_default_backend(backend)
    else:
        after(_REGISTRY, lambda _: torch.compiler.set_default_backend(backend))


def patch_compile(torch: ModuleType, backend: Callable[..., Any], replaced: tuple[str | None, ...] = (None,)) -> None:
    """Replace `torch.compile` by one with this default; a second call replaces the backend.

    It takes the place of the backends in `replaced`; None is a missing one. `nn.Module.compile`
    looks `torch.compile` up at each call.
    """
    plain = getattr(torch.compile, _PLAIN, torch.compile)

    @functools.wraps(plain)
    def compile(model: Any = None, **settings: Any) -> Any:  # noqa: A001 - torch's name
        if settings.get("backend") in replaced:
            settings["backend"] = backend
        return plain(model, **settings)

    setattr(compile, _PLAIN, plain)
    setattr(torch, "compile", compile)  # noqa: B010 - mypy would compare the signatures


def captured_graphs() -> int:
    """Return how many graphs Dynamo has captured in this process, for any backend."""
    utils = sys.modules.get("torch._dynamo.utils")
    return int(utils.counters["stats"]["unique_graphs"]) if utils is not None else 0
