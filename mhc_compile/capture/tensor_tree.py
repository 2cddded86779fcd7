"""Tensors in nested containers, such as the arguments and results of models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch


def tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested containers with their paths: `output.logits`, `input.0`."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from tensors(entry, f"{name}.{key}")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for index, entry in enumerate(value):
            yield from tensors(entry, f"{name}.{index}")
    elif is_dataclass(value):
        for entry in fields(value):
            yield from tensors(getattr(value, entry.name), f"{name}.{entry.name}")


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return the same containers (dicts, lists, tuples) with `function` applied to each tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(entry, function) for key, entry in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(entry, function) for entry in value))
    return type(value)(map_tensors(entry, function) for entry in value) if isinstance(value, (tuple, list)) else value


def fresh(value: Tensor) -> Tensor:
    """Return a copy without a history."""
    return value.detach().clone()


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Return the same containers with every real floating-point tensor in `dtype`."""
    return map_tensors(value, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
