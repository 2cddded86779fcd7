"""Pass streams from one compiled graph to the next.

A graph break splits a model into several graphs, and so does compiling block by block. The code
between two graphs sees an ordinary tensor, the mean of the streams; the stream registry maps it to
its streams. A tensor without streams is expanded to copies; streams that were lost cause a warning.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mhc_compile._torch import has_hooks
from mhc_compile.errors import StreamsLostError, warn
from mhc_compile.graph_breaks.stream_registry import (
    Departed,
    OpenBranch,
    StreamEntry,
    changed,
    find_lost_streams,
    find_registered,
    register_streams,
    registered_streams,
)
from mhc_compile.passes.planning.graph_boundary import BranchInput, BranchOutput, StreamInput, StreamOutput

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from mhc_compile.graph_breaks.split_branches import Notes


class StreamBoundary:
    """A compiled graph whose chains come from other graphs or continue in them.

    Args:
        compiled: the graph. It takes `arrivals` after Dynamo's inputs and returns `departures`
            after Dynamo's results.
        arrivals: the streams and coefficients that enter.
        departures: those that leave.
        positions: positions of the inputs by their targets.
        notes: annotations for the autograd history of the results.
        root: the module whose method the frame is, if any.
        where: file and line of the frame.
        strict: raise errors instead of warnings.

    Raises:
        StreamsLostError: `strict`, and streams of another graph did not arrive.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        arrivals: Sequence[StreamInput | BranchInput],
        departures: Sequence[StreamOutput | BranchOutput],
        *,
        positions: Mapping[str, int],
        notes: Notes,
        root: nn.Module | None,
        where: str,
        strict: bool,
    ) -> None:
        self.compiled = compiled
        self.arrivals = tuple((positions[arrival.value], arrival) for arrival in arrivals)
        self.departures = tuple(departure for departure in departures if isinstance(departure, StreamOutput))
        self.openings = tuple(opening for opening in departures if isinstance(opening, BranchOutput))
        self.positions = positions
        self.notes = notes
        self.extra = len(self.departures) + 2 * len(self.openings)
        self.model = type(root).__name__ if root is not None else "function"
        self.root: Callable[[], nn.Module | None] = weakref.ref(root) if root is not None else lambda: None
        self.where = where
        self.strict = strict
        self._said: set[str] = set()

    def __call__(self, *inputs: Any) -> Any:
        """Run the graph on Dynamo's inputs. Return Dynamo's results."""
        received = [self._receive(inputs[position], arrival) for position, arrival in self.arrivals]
        results = self.compiled(*inputs, *received)
        if self.notes:
            self.notes.write(inputs, results)
        for departure in self.departures:
            path = f"{self.model}.{departure.path}"
            register_streams(
                results[departure.value], results[departure.streams], departure.axis, path, mean=departure.mean
            )
        for opening in self.openings:
            self._begin(opening, inputs, received, results)
        return results[: -self.extra] if self.extra else results

    def _begin(
        self, opening: BranchOutput, inputs: Sequence[Any], received: Sequence[Tensor], results: Sequence[Any]
    ) -> None:
        """Register the coefficients of a branch with the trunk tensor that it starts from."""
        value = results[opening.result] if opening.result is not None else inputs[self.positions[str(opening.value)]]
        entry = registered_streams(value)
        # At the start of a chain the streams are the copies that this graph received.
        if entry is None:
            number = next(n for n, (_, arrival) in enumerate(self.arrivals) if arrival.target == opening.arrival)
            entry = register_streams(value, received[number], opening.axis, f"{self.model}.{opening.name}")
        entry.open[opening.name] = OpenBranch(results[opening.post], results[opening.res], self.root)

    def _receive(self, value: Tensor, arrival: StreamInput | BranchInput) -> Tensor:
        return self._coefficient(value, arrival) if isinstance(arrival, BranchInput) else self._streams(value, arrival)

    def _coefficient(self, value: Tensor, closing: BranchInput) -> Tensor:
        """Return post or res; without coefficients 1 or the identity, which make a plain add."""
        entry = registered_streams(value)
        found = entry.open.get(closing.name) if entry is not None else None
        if found is not None:
            return (found.post if closing.kind == "post" else found.res).contiguous()
        tokens = value.movedim(closing.axis, -1).shape[:-1]
        dtype, n = torch.promote_types(value.dtype, torch.float32), closing.streams
        if closing.kind == "post":
            return torch.ones((*tokens, n), dtype=dtype, device=value.device)
        return torch.eye(n, dtype=dtype, device=value.device).expand(*tokens, n, n).contiguous()

    def _streams(self, value: Tensor, arrival: StreamInput) -> Tensor:
        found = find_registered(value)
        if found is None:
            origin = find_lost_streams(value)
            why = "the tensor was made again on the way" if origin is not None else None
        else:
            origin = found[1].left
            why = _unfit(value, *found, arrival)
        if why is None:
            if origin is None:
                return _copies(value, arrival)
            assert found is not None
            origin.taken = True
            return _take(value, *found)
        assert origin is not None
        self._report(origin, arrival, why)
        return _copies(value, arrival)

    def _report(self, origin: Departed, arrival: StreamInput, why: str) -> None:
        message = (
            f"the streams behind {origin.path} end before {self.model}.{arrival.path} ({self.where}):"
            f" {why}. This graph starts from copies of their mean. Hand the tensor on unchanged, or let both blocks be"
            " compiled in one graph"
        )
        if self.strict:
            raise StreamsLostError(message)
        if why not in self._said:
            self._said.add(why)
            warn(message)


def _take(value: Tensor, other: Tensor, entry: StreamEntry) -> Tensor:
    """Return the streams, routing gradient through `value` if hooks wait for it."""
    if not value.requires_grad:
        return entry.streams.detach()
    observed = value is not other or has_hooks(value) or value.retains_grad
    return _Through.apply(value, entry.streams, entry) if observed else entry.streams


class _Through(torch.autograd.Function):
    """Streams S as a function of their mean y: S = y + (S - mean(S)).

    Hooks on a block's inputs and outputs (FSDP2's, a user's) then see the sum of the stream
    gradients, which is the gradient of a residual trunk. If y is not the mean, it gets zeros, so
    that the hooks still run.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, streams: Tensor, entry: StreamEntry) -> Tensor:
        """Return the streams."""
        ctx.entry = entry.mean, entry.axis
        ctx.like = value.shape
        return streams.view_as(streams)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Split the gradient of the streams."""
        (gradient,) = gradients
        mean, axis = ctx.entry
        if not mean:
            return gradient.new_zeros(ctx.like), gradient, None
        return gradient.sum(-2).movedim(-1, axis), gradient - gradient.mean(-2, keepdim=True), None


def _unfit(value: Tensor, other: Tensor, entry: StreamEntry, arrival: StreamInput) -> str | None:
    why = changed(value, other, entry)
    if why is not None:
        return why
    n = entry.streams.shape[-2]
    if n != arrival.streams:
        return f"there they are {n}, here {arrival.streams}"
    if entry.axis != arrival.axis:
        return f"the features lie on axis {entry.axis} there, on axis {arrival.axis} here"
    if entry.streams.dtype != value.dtype:
        return f"they are {entry.streams.dtype}, and the tensor is {value.dtype}"
    return None


def _copies(value: Tensor, arrival: StreamInput) -> Tensor:
    """Return n copies of `value` [..., n, C], contiguous: the graph was compiled for streams."""
    wide = value.movedim(arrival.axis, -1).unsqueeze(-2)
    return wide.expand(*wide.shape[:-2], arrival.streams, wide.shape[-1]).contiguous()
