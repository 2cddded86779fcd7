"""Adapters for training frameworks."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mhc_compile.integrations.accelerate import register_with_accelerate
    from mhc_compile.integrations.callbacks import StabilityCallback
    from mhc_compile.integrations.saving import register_with_peft, register_with_torchtune, register_with_transformers
    from mhc_compile.integrations.torchtitan import register_with_torchtitan

__all__ = [
    "StabilityCallback",
    "register_with_accelerate",
    "register_with_peft",
    "register_with_torchtitan",
    "register_with_torchtune",
    "register_with_transformers",
]
_HOMES = dict(zip(__all__, ("callbacks", "accelerate", "saving", "torchtitan", "saving", "saving"), strict=True))


def __getattr__(name: str) -> Any:
    """Load a public name on its first use: `import mhc_compile` does not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
