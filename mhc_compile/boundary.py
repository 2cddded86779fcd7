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
    from collections.abc import Callable, Sequence

    from mhc_compile.passes import Arrival, Departure

__all__ = ["Crossing"]

log = logging.getLogger(__name__)

#: How far a tensor's history is followed to see whether it comes from one that had streams.
_NEAR = 8


@dataclass(eq=False)
class _Carried:
    """The streams of one tensor [..., C]: [..., n, C], and what the tensor was when they were put beside it."""

    streams: Tensor
    version: int | None
    axis: int
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
        where: str,
        strict: bool,
    ) -> None:
        self.compiled = compiled
        self.arrivals = tuple(arrivals)
        self.departures = tuple(departures)
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
            _carry(results[departure.value], results[departure.streams], departure)
        return results[: -len(self.departures)]

    def _receive(self, value: Tensor, arrival: Arrival) -> Tensor:
        found = _find(value)
        if found is None:
            origin = _origin(value)
            why = "the tensor was made anew on the way" if origin is not None else None
        else:
            origin = found[1]
            why = _unfit(value, *found, arrival)
        if why is None:
            if origin is None:
                return _copies(value, arrival)
            origin.taken = True
            return origin.streams if value.requires_grad else origin.streams.detach()
        assert origin is not None
        self._report(origin, arrival, why)
        return _copies(value, arrival)

    def _report(self, origin: _Carried, arrival: Arrival, why: str) -> None:
        message = (
            f"the streams behind {origin.path} end before {arrival.path} ({self.where}): {why}. This graph starts from copies of their mean."
            " Hand the tensor on unchanged, or let both blocks be compiled in one graph"
        )
        if self.strict:
            raise StreamsLostError(message)
        if why not in self._said:
            self._said.add(why)
            warn(message)


def _carry(value: Tensor, streams: Tensor, departure: Departure) -> None:
    _carried[value] = _Carried(streams, _version(value), departure.axis, departure.path)


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
    if value is not other and value.requires_grad and not _descends(value, other, 3):
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


def _origin(value: Tensor) -> _Carried | None:
    """The streams, taken by nobody yet, of a tensor from which `value` was made by a few operations. Known only where autograd records."""
    if value.grad_fn is None:
        return None
    return next((carried for other, carried in _alive() if not carried.taken and _descends(value, other, _NEAR)), None)


def _descends(value: Tensor, other: Tensor, limit: int) -> bool:
    """Whether the history of `value` reaches that of `other` within `limit` operations."""
    if other.grad_fn is None or value.grad_fn is None:
        return value.grad_fn is other.grad_fn and not value.requires_grad
    layer, seen = [value.grad_fn], set()
    for _ in range(limit):
        if other.grad_fn in layer:
            return True
        seen.update(layer)
        layer = [step for node in layer for step, _ in node.next_functions if step is not None and step not in seen]
    return other.grad_fn in layer


def _copies(value: Tensor, arrival: Arrival) -> Tensor:
    """N copies of `value`, [..., n, C]. In memory of their own: the graph was compiled for streams, not for a broadcast view."""
    wide = value.movedim(arrival.axis, -1).unsqueeze(-2)
    return wide.expand(*wide.shape[:-2], arrival.streams, wide.shape[-1]).contiguous()
