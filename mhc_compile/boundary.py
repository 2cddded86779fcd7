"""Streams between graphs: a tensor that leaves a compiled graph takes its streams along, and the next graph goes on with them.

A graph break cuts a model into several graphs, and blocks that are compiled one by one are graphs of their own. What passes from one to the next is
the mean of the streams, an ordinary tensor; whatever code lies in between sees nothing else. The streams are kept beside it, here, as long as it
lives. They count while the tensor is what it was: the same memory, not written to since, and connected in autograd as before. Any other tensor
starts as copies, as the first of a model does; where streams were lost on the way, that is said.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mhc_compile._torch import WeakTensorKeyDictionary
from mhc_compile._warn import warn
from mhc_compile.errors import StreamsLostError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mhc_compile.passes import Arrival, Departure

__all__ = ["Crossing"]

log = logging.getLogger(__name__)

#: How far a tensor's history is followed to see whether it comes from one that had streams.
_NEAR = 8
#: The key of `Node.metadata` under which the history has them.
_LEFT = "mhc_streams"


@dataclass(eq=False)
class _Carried:
    """The streams of one tensor [..., C]: [..., n, C], and what the tensor was when they were put beside it."""

    streams: Tensor
    version: int | None
    axis: int
    left: _Left


@dataclass(eq=False)
class _Left:
    """The site whose streams left a graph, and whether another graph took them. Kept in the history of the tensor, which outlives the tensor."""

    path: str
    taken: bool = False


#: The tensors that have streams. Neither they nor their streams are kept alive by this.
_carried: Any = WeakTensorKeyDictionary()


class Crossing:
    """A compiled graph whose chains come from other graphs or go on in them. It is called as the graph that Dynamo captured.

    Args:
        compiled: the graph with the inputs `arrivals` behind Dynamo's, and the results `departures` behind Dynamo's.
        arrivals: the streams that enter, each with the position of the input that they belong to.
        departures: the streams that leave.
        model: class of the module whose frame it is, for messages.
        where: file and line of the frame, for messages.
        strict: streams that are lost are an error.

    Raises:
        StreamsLostError: `strict`, and streams that left another graph did not arrive here.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        arrivals: Sequence[tuple[int, Arrival]],
        departures: Sequence[Departure],
        *,
        model: str,
        where: str,
        strict: bool,
    ) -> None:
        self.compiled = compiled
        self.arrivals = tuple(arrivals)
        self.departures = tuple(departures)
        self.model = model
        self.where = where
        self.strict = strict
        self._said: set[str] = set()

    def __call__(self, *inputs: Any) -> Any:
        """Runs the graph on Dynamo's inputs, and gives Dynamo's results."""
        results = self.compiled(
            *inputs, *(self._receive(inputs[position], arrival) for position, arrival in self.arrivals)
        )
        if not self.departures:
            return results
        for departure in self.departures:
            _carry(results[departure.value], results[departure.streams], departure, self.model)
        return results[: -len(self.departures)]

    def _receive(self, value: Tensor, arrival: Arrival) -> Tensor:
        found = _find(value)
        if found is None:
            origin = _origin(value)
            why = "the tensor was made anew on the way" if origin is not None else None
        else:
            origin = found[1].left
            why = _unfit(value, *found, arrival)
        if why is None:
            if origin is None:
                return _copies(value, arrival)
            assert found is not None
            origin.taken = True
            return found[1].streams if value.requires_grad else found[1].streams.detach()
        assert origin is not None
        self._report(origin, arrival, why)
        return _copies(value, arrival)

    def _report(self, origin: _Left, arrival: Arrival, why: str) -> None:
        message = (
            f"the streams behind {origin.path} end before {self.model}.{arrival.path} ({self.where}):"
            f" {why}. This graph starts from copies of their mean. Hand the tensor on unchanged, or let both blocks be compiled in one graph"
        )
        if self.strict:
            raise StreamsLostError(message)
        if why not in self._said:
            self._said.add(why)
            warn(message)


def _carry(value: Tensor, streams: Tensor, departure: Departure, model: str) -> None:
    left = _Left(f"{model}.{departure.path}")
    _carried[value] = _Carried(streams, _version(value), departure.axis, left)
    if value.grad_fn is not None:
        history: Any = value.grad_fn.metadata
        history[_LEFT] = left


def carried_axis(value: Any) -> int | None:
    """The feature axis (< 0) of the streams that `value` has, None if it has none."""
    found = _find(value) if isinstance(value, Tensor) and len(_carried) else None
    return None if found is None or _changed(value, *found) else found[1].axis


def _version(value: Tensor) -> int | None:
    """How often the tensor was written to; not known in inference mode."""
    return None if value.is_inference() else value._version


def _find(value: Tensor) -> tuple[Tensor, _Carried] | None:
    """The tensor with streams that `value` is, or whose memory it has under another name, as behind the hooks of FSDP2."""
    carried = _carried.get(value)
    if carried is not None:
        return value, carried
    return next(((other, carried) for other, carried in _alive() if _is_alias(value, other)), None)


def _alive() -> list[tuple[Tensor, _Carried]]:
    """All tensors with streams, the latest first."""
    return list(_carried.items())[::-1]


def _is_alias(value: Tensor, other: Tensor) -> bool:
    return (
        value.device == other.device
        and value.dtype == other.dtype
        and value.shape == other.shape
        and value.stride() == other.stride()
        and value.numel() > 0
        and value.data_ptr() == other.data_ptr()
    )


def _changed(value: Tensor, other: Tensor, carried: _Carried) -> str | None:
    """Why `value` is no longer the tensor beside which the streams were put, None if it still is."""
    if _version(value) != carried.version:
        return "the tensor was written to in place on the way"
    if value is not other and not _is_connected(value, other):
        return "the tensor was cut off from its history on the way, as in a reentrant checkpoint"
    if value.requires_grad and not (torch.is_grad_enabled() and carried.streams.requires_grad):
        return "its history is not recorded here, as in a reentrant checkpoint"
    return None


def _unfit(value: Tensor, other: Tensor, carried: _Carried, arrival: Arrival) -> str | None:
    why = _changed(value, other, carried)
    if why is not None:
        return why
    n = carried.streams.shape[-2]
    if n != arrival.streams:
        return f"there they are {n}, here {arrival.streams}"
    if carried.axis != arrival.axis:
        return f"the features lie on axis {carried.axis} there, on axis {arrival.axis} here"
    if carried.streams.dtype != value.dtype:
        return f"they are {carried.streams.dtype}, and the tensor is {value.dtype}"
    return None


def _origin(value: Tensor) -> _Left | None:
    """The streams, taken by nobody yet, of a tensor from which `value` was made by a few operations. Known only where autograd records."""
    found = (node.metadata.get(_LEFT) for node in _history(value, _NEAR))
    return next((left for left in found if left is not None and not left.taken), None)


def _is_connected(value: Tensor, other: Tensor) -> bool:
    """Whether gradients flow from an alias to the tensor itself: not where it was detached."""
    return value.requires_grad == other.requires_grad and (
        not value.requires_grad or any(node is other.grad_fn for node in _history(value, 3))
    )


def _history(value: Tensor, limit: int) -> Iterator[Any]:
    """The operations that `value` was made by, the last first, up to `limit` steps back."""
    layer, seen = [value.grad_fn] if value.grad_fn is not None else [], set()
    for _ in range(limit):
        yield from layer
        seen.update(layer)
        layer = [step for node in layer for step, _ in node.next_functions if step is not None and step not in seen]


def _copies(value: Tensor, arrival: Arrival) -> Tensor:
    """N copies of `value`, [..., n, C]. In memory of their own: the graph was compiled for streams, not for a broadcast view."""
    wide = value.movedim(arrival.axis, -1).unsqueeze(-2)
    return wide.expand(*wide.shape[:-2], arrival.streams, wide.shape[-1]).contiguous()
