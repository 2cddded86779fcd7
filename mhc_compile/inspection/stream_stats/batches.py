"""A batch, as loaders give it, as the inputs of a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mhc_compile.capture.tensor_tree import map_tensors

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["inputs_of", "on_device"]


def inputs_of(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named inputs of `model`.

    A single tuple or list is taken for a loader's batch, its entries for the first inputs, and a single mapping whose keys are names of inputs for
    inputs by name. Entries that `forward` does not take, such as labels, are left out. Other inputs stay as they are.
    """
    if len(args) != 1 or kwargs:
        return args, kwargs
    (batch,) = args
    parameters = inspect.signature(model.forward).parameters.values()
    if isinstance(batch, Mapping) and all(isinstance(key, str) for key in batch):
        takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters)
        named = {one.name for one in parameters if one.kind in {one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY}}
        given = {key: value for key, value in batch.items() if takes_all or key in named}
        return ((), given) if given else (args, kwargs)
    if isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields"):
        if any(one.kind is one.VAR_POSITIONAL for one in parameters):
            return tuple(batch), {}
        places = sum(one.kind in {one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD} for one in parameters)
        return tuple(batch[:places]), {}
    return args, kwargs


def on_device(value: Any, device: torch.device) -> Any:
    """Nested containers with their tensors on `device`."""
    if isinstance(value, Mapping):
        return {key: on_device(entry, device) for key, entry in value.items()}
    return map_tensors(value, lambda tensor: tensor.to(device))
