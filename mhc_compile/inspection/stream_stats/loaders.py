"""A batch out of a loader that is in use, without moving it on."""

from __future__ import annotations

from typing import Any

from mhc_compile.errors import MhcError

__all__ = ["first_batch"]


def first_batch(loader: Any, size: int) -> Any:
    """The first examples of the loader's data set, put together as the loader does it.

    Iterating over the loader would start workers, draw random numbers, and, of accelerate's, tell the optimizer that an epoch has begun.

    Args:
        loader: a `torch.utils.data.DataLoader`, or one made of it.
        size: examples, at most.

    Raises:
        MhcError: the data set has no length or no items, or the loader no function that puts examples together.
    """
    data: Any = getattr(loader, "dataset", None)
    collate = getattr(loader, "collate_fn", None)
    if collate is None or not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise MhcError(
            f"StabilityCallback cannot take a batch out of {type(loader).__name__} over {type(data).__name__} without moving it on."
            " Give it one: StabilityCallback(batch=...)"
        )
    return collate([data[index] for index in range(min(size, len(data)))])
