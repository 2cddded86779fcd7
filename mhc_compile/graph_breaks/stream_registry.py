"""Map tensors between compiled graphs to their streams.

An entry is valid while the tensor has the same memory, was not written to, and has the same place
in the autograd graph. Aliases match too, because FSDP2 passes a module's inputs through an identity
operation.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable  # noqa: TC003 - a field of a dataclass
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mhc_compile import _torch
from mhc_compile._torch import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator

    from mhc_compile.attachment.ledger import Record

#: Operations to go back in a tensor's history when looking for a tensor with streams.
_NEAR = 8
#: Key of the streams in `Node.metadata`.
_LEFT = "mhc_streams"


@dataclass(eq=False)
class StreamEntry:
    """The streams [..., n, C] of one tensor [..., C], and its write count at registration."""

    streams: Tensor
    version: int | None
    axis: int
    left: Departed
    #: Whether the tensor is the mean of the streams.
    mean: bool
    #: The branches that start at the tensor, by the names of their sites.
    open: dict[str, OpenBranch] = field(default_factory=dict)


@dataclass(eq=False)
class OpenBranch:
    """A branch without its add: coefficients post [..., n], res [..., n, n]; the root module."""

    post: Tensor
    res: Tensor
    root: Callable[[], nn.Module | None]
    #: The site, and whether a graph has its sum.
    left: Departed
    record: Record
    #: The graph that has the sum.
    closed_in: str = ""

    def __post_init__(self) -> None:
        self.record.open += 1

    def close(self, place: str) -> None:
        """Record that the graph of the frame at `place` has the sum."""
        self.record.open -= not self.left.taken
        self.left.taken, self.closed_in = True, place

    def __del__(self) -> None:
        if not self.left.taken:
            self.record.open -= 1
            self.record.dropped += 1


@dataclass(eq=False)
class Departed:
    """The site whose streams left a graph, and whether a graph took them. Outlives the tensor."""

    path: str
    #: Position of the site in its chain.
    index: int
    #: Shape of the tensor that they stand for.
    shape: torch.Size
    #: Whether its branch began, and its sum is missing.
    begun: bool = False
    taken: bool = False


class _Thread(threading.local):
    """The last streams, or coefficients of a branch, that left a graph in this thread."""

    latest: Departed | None = None


#: Tensors with streams. Weak in both.
_carried: Any = WeakTensorKeyDictionary()
#: The heads of branches that read a tensor, for results without a history. Weak in the tensors.
_noted: Any = WeakTensorKeyDictionary()
#: Guards growth and iteration: several threads may run models.
_lock = threading.Lock()
_thread = _Thread()


def register_streams(value: Tensor, streams: Tensor, axis: int, left: Departed, *, mean: bool = True) -> StreamEntry:
    """Register streams [..., n, C] that `left` for `value` with features on `axis` (< 0)."""
    entry = StreamEntry(streams, _torch.write_count(value), axis, left, mean)
    with _lock:
        _carried[value] = entry
    _thread.latest = left
    if value.grad_fn is not None:
        metadata: Any = value.grad_fn.metadata
        metadata.setdefault(_LEFT, {})[value.output_nr] = entry.left
    return entry


def open_branch(entry: StreamEntry, name: str, branch: OpenBranch) -> None:
    """Record that the branch of site `name` starts at the tensor of `entry`."""
    entry.open[name] = branch
    _thread.latest = branch.left


def lost_before(index: int, value: Tensor) -> Departed | None:
    """Return what left a graph just before the site with this index at `value`, and was lost.

    With a history, `find_lost_streams` answers for streams, and knows one call from the next.
    """
    left, _thread.latest = _thread.latest, None
    follows = left is not None and (left.index + 1, left.shape) == (index, value.shape)
    if left is None or not follows or left.taken or (torch.is_grad_enabled() and not left.begun):
        return None
    return left


def note_head(value: Tensor, key: Hashable, note: Any, result: Tensor) -> None:
    """Record that a head, `key`, read `value` and computed `result`."""
    with _lock:
        _noted.setdefault(value, {})[key] = note, _torch.TensorWeakRef(result)


def noted_heads(value: Tensor) -> list[tuple[Any, Any]]:
    """Return the notes on heads of branches that read `value`, with their results (weak)."""
    return list(_noted.get(value, {}).values())


def registered_streams(value: Tensor) -> StreamEntry | None:
    """Return the streams registered for `value`, or None if the tensor has changed since."""
    found = find_registered(value) if len(_carried) else None
    return None if found is None or changed(value, *found) else found[1]


def carried_axis(value: Any) -> int | None:
    """Return the feature axis (< 0) of the streams of `value`, or None."""
    entry = registered_streams(value) if isinstance(value, Tensor) else None
    return None if entry is None else entry.axis


def find_registered(value: Tensor) -> tuple[Tensor, StreamEntry] | None:
    """Return the tensor with streams that `value` is or, as after FSDP2's hooks, aliases."""
    entry = _carried.get(value)
    if entry is not None:
        return value, entry
    with _lock:
        latest_first = list(_carried.items())[::-1]
    return next(((other, entry) for other, entry in latest_first if _is_alias(value, other)), None)


def _is_alias(value: Tensor, other: Tensor) -> bool:
    return (
        value.device == other.device
        and value.dtype == other.dtype
        and value.shape == other.shape
        and value.stride() == other.stride()
        and _torch.address(value) == _torch.address(other) != 0  # 0: empty, or a wrapper of other tensors
    )


def changed(value: Tensor, other: Tensor, entry: StreamEntry) -> str | None:
    """Return why streams of `other` are not valid for `value`, or None."""
    if _torch.write_count(value) != entry.version:
        return "the tensor was written to in place on the way"
    if value is not other and (
        value.requires_grad != other.requires_grad
        or (value.requires_grad and all(node is not other.grad_fn for node, _ in history(value, _NEAR)))
    ):
        return "the tensor was cut off from its history on the way, as in a reentrant checkpoint"
    if value.requires_grad and not (torch.is_grad_enabled() and entry.streams.requires_grad):
        return "its history is not recorded here, as in a reentrant checkpoint"
    return None


def find_lost_streams(value: Tensor) -> Departed | None:
    """Return untaken streams of a tensor from which a few recorded operations made `value`."""
    found = (node.metadata.get(_LEFT, {}).get(output) for node, output in history(value, _NEAR))
    return next((left for left in found if left is not None and not left.taken), None)


def history(
    value: Tensor, limit: int, stop: Callable[[tuple[Any, int]], bool] = lambda _: False
) -> Iterator[tuple[Any, int]]:
    """Yield up to `limit` operations behind `value`, nearest first, each with its output number.

    The inputs of an operation for which `stop` returns True are not followed.
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
