"""Streams beside tensors: what a tensor that left a compiled graph stands for, as long as it lives and stays what it is.

The streams of a tensor count while it is the same memory, not written to since, and connected in
autograd as it was. That an alias counts as well is for the sake of wrappers that pass a module's
inputs through an operation of their own that changes nothing, as FSDP2 does.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable  # noqa: TC003 - a field of a dataclass
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mhc_compile._torch import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "Departed",
    "OpenBranch",
    "StreamEntry",
    "carried_axis",
    "changed",
    "find_lost_streams",
    "find_registered",
    "history",
    "register_streams",
    "registered_streams",
]

#: How far a tensor's history is followed to see whether it comes from one that had streams.
_NEAR = 8
#: The key of `Node.metadata` under which the history has them.
_LEFT = "mhc_streams"


@dataclass(eq=False)
class StreamEntry:
    """The streams of one tensor [..., C]: [..., n, C], and what the tensor was when they were put beside it."""

    streams: Tensor
    version: int | None
    axis: int
    left: Departed
    #: Whether the tensor is the mean of the streams.
    mean: bool
    #: The branches that began at the tensor, by the names of their sites.
    open: dict[str, OpenBranch] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class OpenBranch:
    """A branch that began at a tensor: its coefficients post [..., n] and res [..., n, n], and a module whose frame begins it so."""

    post: Tensor
    res: Tensor
    root: Callable[[], nn.Module | None]


@dataclass(eq=False)
class Departed:
    """The site whose streams left a graph, and whether another graph took them.

    Kept in the history of the tensor, which outlives the tensor.
    """

    path: str
    taken: bool = False


#: The tensors that have streams. Neither they nor their streams are kept alive by this.
_carried: Any = WeakTensorKeyDictionary()
#: Held where the table grows or is walked through: models may run in several threads.
_lock = threading.Lock()


def register_streams(value: Tensor, streams: Tensor, axis: int, path: str, *, mean: bool = True) -> StreamEntry:
    """Puts streams [..., n, C] beside `value`, whose features lie on `axis` (< 0).

    `path` names the site that they come from.
    """
    entry = StreamEntry(streams, _version(value), axis, Departed(path), mean)
    with _lock:
        _carried[value] = entry
    if value.grad_fn is not None:
        metadata: Any = value.grad_fn.metadata
        metadata.setdefault(_LEFT, {})[value.output_nr] = entry.left
    return entry


def registered_streams(value: Tensor) -> StreamEntry | None:
    """What is kept beside `value`, if it still is what it was."""
    found = find_registered(value) if len(_carried) else None
    return None if found is None or changed(value, *found) else found[1]


def carried_axis(value: Any) -> int | None:
    """The feature axis (< 0) of the streams that `value` has, None if it has none."""
    entry = registered_streams(value) if isinstance(value, Tensor) else None
    return None if entry is None else entry.axis


def _version(value: Tensor) -> int | None:
    """How often the tensor was written to; not known in inference mode."""
    return None if value.is_inference() else value._version


def find_registered(value: Tensor) -> tuple[Tensor, StreamEntry] | None:
    """The tensor with streams that `value` is, or whose memory it has under another name, as behind the hooks of FSDP2."""
    entry = _carried.get(value)
    if entry is not None:
        return value, entry
    return next(((other, entry) for other, entry in _alive() if _is_alias(value, other)), None)


def _alive() -> list[tuple[Tensor, StreamEntry]]:
    """All tensors with streams, the latest first."""
    with _lock:
        return list(_carried.items())[::-1]


def _is_alias(value: Tensor, other: Tensor) -> bool:
    return (
        value.device == other.device
        and value.dtype == other.dtype
        and value.shape == other.shape
        and value.stride() == other.stride()
        and value.data_ptr() == other.data_ptr() != 0  # 0: empty, or a wrapper round other tensors
    )


def changed(value: Tensor, other: Tensor, entry: StreamEntry) -> str | None:
    """Why `value` is no longer the tensor beside which the streams were put, None if it still is."""
    if _version(value) != entry.version:
        return "the tensor was written to in place on the way"
    if value is not other and not _is_connected(value, other):
        return "the tensor was cut off from its history on the way, as in a reentrant checkpoint"
    if value.requires_grad and not (torch.is_grad_enabled() and entry.streams.requires_grad):
        return "its history is not recorded here, as in a reentrant checkpoint"
    return None


def find_lost_streams(value: Tensor) -> Departed | None:
    """The streams, taken by nobody yet, of a tensor from which `value` was made by a few operations. Known only where autograd records."""
    found = (node.metadata.get(_LEFT, {}).get(output) for node, output in history(value, _NEAR))
    return next((left for left in found if left is not None and not left.taken), None)


def _is_connected(value: Tensor, other: Tensor) -> bool:
    """Whether gradients flow from an alias to the tensor itself: not where it was detached."""
    return value.requires_grad == other.requires_grad and (
        not value.requires_grad or any(node is other.grad_fn for node, _ in history(value, _NEAR))
    )


def history(
    value: Tensor, limit: int, stop: Callable[[tuple[Any, int]], bool] = lambda _: False
) -> Iterator[tuple[Any, int]]:
    """The operations that `value` was made by, each with the number of its result, the nearest first, at most `limit` of them.

    Behind one that `stop` says yes to, it is not followed.
    """
    queue: deque[tuple[Any, int]] = deque([(value.grad_fn, value.output_nr)] if value.grad_fn is not None else ())
    seen = set(queue)
    for _ in range(limit):
        if not queue:
            return
        step = queue.popleft()
        yield step
        if stop(step):
            continue
        for before in step[0].next_functions:
            if before[0] is not None and before not in seen:
                seen.add(before)
                queue.append(before)
