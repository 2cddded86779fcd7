"""Pass streams from one compiled graph to the next.

A graph break splits a model into several graphs, and so does compiling block by block. The code
between two graphs sees an ordinary tensor, the mean of the streams; the stream registry maps it to
its streams. A tensor without streams is expanded to copies; streams that were lost cause a warning.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mhc_compile import _torch
from mhc_compile._torch import has_hooks
from mhc_compile.attachment.model_tree import split_path
from mhc_compile.errors import StreamsLostError, warn
from mhc_compile.graph_breaks.stream_registry import (
    Departed,
    OpenBranch,
    StreamEntry,
    changed,
    find_lost_streams,
    find_registered,
    lost_before,
    noted_heads,
    open_branch,
    register_streams,
    registered_streams,
)
from mhc_compile.passes.planning.graph_boundary import BranchInput, BranchOutput, StreamInput, StreamOutput

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import CodeType

    from mhc_compile.attachment.ledger import GraphLedger, Record
    from mhc_compile.graph_breaks.split_branches import Notes

#: How often the two parts of a branch are traced again because the first did not read streams.
_RETRIES = 3
#: How often a branch begins without an end before that is reported: a call may have raised.
_DROPPED = 3
#: The number of retries by the code of the second part and the name of the site.
_retried: weakref.WeakKeyDictionary[CodeType, Counter[str]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Origin:
    """The frame of a graph: class of its root, the root and the code (weak), and "file:line"."""

    model: str
    root: Callable[[], nn.Module | None]
    where: str
    code: weakref.ref[CodeType]


@dataclass(frozen=True, eq=False)
class Tail:
    """A site whose branch began in another graph.

    Attributes:
        path: its path below the root.
        heads: code (weak) of the frames in which the branch begins.
        fresh: whether the heads are traced again after this graph, whose trace found their site.
        starting: whether that trace also created the hyper-connection, and a plain add is what it
            computes at its start.
    """

    path: str
    heads: tuple[weakref.ref[CodeType], ...]
    fresh: bool
    starting: bool


class StreamBoundary:
    """A compiled graph whose chains come from other graphs or continue in them.

    Args:
        compiled: the graph. It takes `arrivals` after Dynamo's inputs and returns `departures`
            after Dynamo's results.
        arrivals: the streams and coefficients that enter.
        departures: those that leave.
        positions: positions of the inputs by their targets.
        notes: annotations for the autograd history of the results.
        origin: the frame.
        ledger: the records of its sites.
        entries: the entry of the ledger for each path (of an opening: name) with parameters here.
        tails: the sites whose branches began in other graphs, by the input that is their trunk.
        strict: raise errors instead of warnings.

    Raises:
        StreamsLostError: `strict`, and streams or coefficients of another graph did not arrive.
    """

    def __init__(
        self,
        compiled: Callable[..., Any],
        arrivals: Sequence[StreamInput | BranchInput],
        departures: Sequence[StreamOutput | BranchOutput],
        *,
        positions: Mapping[str, int],
        notes: Notes,
        origin: Origin,
        ledger: GraphLedger,
        entries: Mapping[str, int],
        tails: Mapping[str, Tail],
        strict: bool,
    ) -> None:
        self.compiled = compiled
        self.arrivals = tuple((positions[arrival.value], arrival) for arrival in arrivals)
        self.departures = tuple(departure for departure in departures if isinstance(departure, StreamOutput))
        self.openings = tuple(opening for opening in departures if isinstance(opening, BranchOutput))
        self.positions = positions
        self.notes = notes
        self.extra = len(self.departures) + 2 * len(self.openings)
        self.origin, self.ledger, self.entries, self.tails = origin, ledger, entries, tails
        self.strict = strict
        self._warned: set[str] = set()
        self._called = False
        #: The records of the tails, by path, in the latest call.
        self._closed: dict[str, Record] = {}

    def __call__(self, *inputs: Any) -> Any:
        """Run the graph on Dynamo's inputs. Return Dynamo's results."""
        received = [self._receive(inputs[position], arrival, inputs) for position, arrival in self.arrivals]
        results = self.compiled(*inputs, *received)
        self.ledger.count(inputs)
        if self.notes:
            self.notes.write(inputs, results)
        for departure in self.departures:
            value, path = results[departure.value], departure.path
            left = Departed(f"{self.origin.model}.{path}", self._index(path, inputs), value.shape)
            register_streams(value, results[departure.streams], departure.axis, left, mean=departure.mean)
        for opening in self.openings:
            self._begin(opening, inputs, received, results)
        self._called = True
        return results[: -self.extra] if self.extra else results

    def _index(self, path: str, inputs: Sequence[Any]) -> int:
        """Return the position in its chain of the site `path`, whose parameters are in `inputs`."""
        record = self._record(path, inputs)
        return record.index if record is not None else -2  # follows and precedes none

    def _record(self, path: str, inputs: Sequence[Any]) -> Record | None:
        number = self.entries.get(path)
        if number is None:
            return self._closed.get(path)
        return self.ledger.find(number, inputs[self.ledger.inputs[number][0]])

    def _begin(
        self, opening: BranchOutput, inputs: Sequence[Any], received: Sequence[Tensor], results: Sequence[Any]
    ) -> None:
        """Register the coefficients of a branch with the trunk tensor that it starts from."""
        value = results[opening.result] if opening.result is not None else inputs[self.positions[str(opening.value)]]
        entry, record = registered_streams(value), self._record(opening.name, inputs)
        assert record is not None
        left = Departed(f"the branch {opening.name!r} of {self.origin.model}", record.index, value.shape, begun=True)
        # At the start of a chain the streams are the copies that this graph received.
        if entry is None:
            number = next(n for n, (_, arrival) in enumerate(self.arrivals) if arrival.target == opening.arrival)
            entry = register_streams(value, received[number], opening.axis, replace(left))
        branch = OpenBranch(results[opening.post], results[opening.res], self.origin.root, left, record)
        open_branch(entry, opening.name, branch)
        if record.dropped >= _DROPPED and not record.computed:
            number, record.dropped = record.dropped, 0
            self._report(
                f"{left.path} ({self.origin.where}) began on streams {number} times, and no compiled graph had its"
                " residual add: it ran outside of any graph, on the mean of the streams, or was rejected."
                " mhc_compile.explain(model, ...) shows each addition with its reason"
            )

    def _receive(self, value: Tensor, arrival: StreamInput | BranchInput, inputs: Sequence[Any]) -> Tensor:
        if isinstance(arrival, BranchInput):
            return self._coefficient(value, arrival)
        return self._streams(value, arrival, inputs)

    def _coefficient(self, value: Tensor, closing: BranchInput) -> Tensor:
        """Return post or res; without coefficients 1 or the identity, which make a plain add."""
        entry = registered_streams(value)
        found = entry.open.get(closing.name) if entry is not None else None
        if found is not None:
            if closing.kind == "post":
                self._close(found, closing)
            return (found.post if closing.kind == "post" else found.res).contiguous()
        if closing.kind == "post":
            self._start_again(value, closing)
        tokens = value.movedim(closing.axis, -1).shape[:-1]
        dtype, n = torch.promote_types(value.dtype, torch.float32), closing.streams
        if closing.kind == "post":
            return torch.ones((*tokens, n), dtype=dtype, device=value.device)
        return torch.eye(n, dtype=dtype, device=value.device).expand(*tokens, n, n).contiguous()

    def _close(self, branch: OpenBranch, closing: BranchInput) -> None:
        if branch.closed_in not in ("", self.origin.where):  # a checkpoint runs the same graph again
            self._report(
                f"the branch {closing.name!r} of {self.origin.model} is added to its streams twice, in"
                f" {branch.closed_in} and in {self.origin.where}: two residual adds were taken for the end of one branch"
            )
        if not branch.left.taken:
            branch.record.computed += 1
            if self.ledger.graph not in branch.record.graphs:
                branch.record.enter(self.ledger.graph)
        self._closed[self.tails[closing.value].path] = branch.record
        branch.close(self.origin.where)
        if not self._called and (code := self.origin.code()) is not None:
            _retried.pop(code, None)

    def _start_again(self, value: Tensor, closing: BranchInput) -> None:
        """Report a branch that did not begin on streams, and have both its parts traced again."""
        name, tail, code = closing.name, self.tails[closing.value], self.origin.code()
        expected, again = tail.fresh and not self._called, True
        if not expected and code is not None:
            retried = _retried.setdefault(code, Counter())
            retried[name] += 1
            again = retried[name] <= _RETRIES
            beginnings = [note.beginning for note, _ in noted_heads(value)]  # another model may share this graph
            for beginning in beginnings:
                beginning.begin(*split_path(tail.path))
            heads = (*tail.heads, *(beginning.code for beginning in beginnings))
            for head in (code, *(head() for head in heads)) if again else ():
                if head is not None:
                    _torch.forget_compiled(head, all_entries=False)
        if expected and tail.starting and _are_equal(registered_streams(value)):
            return
        way_out = (
            "Both are traced again at the next call. mhc_compile.attach(model, *inputs), also after a restore, makes the"
            " first call right"
            if again
            else "No compiled graph is the first to read the trunk there: let a module that is compiled (a norm, a"
            " projection) be the first, or take the hyper-connections off with mhc_compile.detach(model)"
        )
        self._report(
            f"the branch {name!r} of {self.origin.model} ran outside of the graph of its residual add"
            f" ({self.origin.where}), and the graph in which it begins read the mean of the streams: in this call that add"
            f" is a plain one, without its hyper-connection, and others are not. {way_out}",
            again=again,  # equivalent blocks share this graph
        )

    def _streams(self, value: Tensor, arrival: StreamInput, inputs: Sequence[Any]) -> Tensor:
        found = find_registered(value)
        if found is None:
            origin = find_lost_streams(value) or lost_before(self._index(arrival.path, inputs), value)
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
        here = f"{self.origin.model}.{arrival.path} ({self.origin.where})"
        if origin.begun:
            self._report(
                f"{origin.path} began on streams, and its residual add ran outside of any compiled graph, or was rejected:"
                f" {here} starts from copies of the mean. Let a compiled graph have the add;"
                " mhc_compile.explain(model, ...) shows rejected ones"
            )
        else:
            self._report(
                f"the streams behind {origin.path} end before {here}: {why}. This graph starts from copies of their mean."
                " Hand the tensor on unchanged, or let both blocks be compiled in one graph"
            )
        return _copies(value, arrival)

    def _report(self, message: str, *, again: bool = False) -> None:
        """Warn, once for each graph unless `again`; raise if `strict`."""
        if self.strict:
            raise StreamsLostError(message)
        if again or message not in self._warned:
            self._warned.add(message)
            warn(message, repeat=again)


def _are_equal(entry: StreamEntry | None) -> bool:
    """Return whether all streams are the same, as at the start of all hyper-connections."""
    if entry is None or entry.streams.is_meta:
        return True
    streams = entry.streams.detach()
    tolerance = max(1e-3, 8 * torch.finfo(streams.dtype).eps)
    return bool((streams - streams[..., :1, :]).abs().max() <= tolerance * streams.abs().max())


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
