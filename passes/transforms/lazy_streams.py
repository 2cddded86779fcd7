"""Leave streams unwritten, in a graph of forward and backward together.

The streams after k sites are a combination of those that were written last and of the k outputs of
branches since (`mhc_compile.ops.lazy_reference`). The outputs are kept for the backward anyway;
streams that are never written need not be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from mhc_compile import ops
from mhc_compile.passes.analysis.op_info import known_tensor
from mhc_compile.passes.core.pass_base import Pass, copy_graph

if TYPE_CHECKING:
    from torch.fx import Graph, Node

_mhc = torch.ops.mhc
_STEP = _mhc.step.default
#: Operators that read streams, their lazy forms, and the position of their old streams.
_READERS = {
    _STEP: (_mhc.lazy_step.default, 0),
    _mhc.close.default: (_mhc.lazy_close.default, 0),
    _mhc.step_backward.default: (_mhc.lazy_step_backward.default, 4),
    _mhc.close_backward.default: (_mhc.lazy_close_backward.default, 1),
}
_CLOSES = _mhc.close.default, _mhc.close_backward.default


class _Sources(NamedTuple):
    """Streams as written last, and what the sites that have ended since wrote to them."""

    streams: Node  # [..., m, C]
    branches: tuple[Node, ...]
    post: tuple[Node, ...]
    res: tuple[Node, ...]

    def then(self, branch: Node, post: Node, res: Node) -> _Sources:
        return _Sources(self.streams, (*self.branches, branch), (*self.post, post), (*self.res, res))

    @property
    def operands(self) -> tuple[Any, ...]:
        return self.streams, *map(list, (self.branches, self.post, self.res))


@dataclass(frozen=True)
class LazyStreams(Pass):
    """Write the streams of a chain at every `length`-th step only, or as rarely as kernels can.

    before: S1, h1, ... = mhc.step(X, y, p, r, ...)
            S2, h2, ... = mhc.step(S1, y1, p1, r1, ...)
            dS1, dy1, ... = mhc.step_backward(dS2, ..., S1, y1, p1, r1, ...)

    after:  _, h1, ... = mhc.lazy_step(X, [y], [p], [r], ..., False, ...)
            S2, h2, ... = mhc.lazy_step(X, [y, y1], [p, p1], [r, r1], ..., True, ...)
            dS1, dy1, ... = mhc.lazy_step_backward(dS2, ..., X, [y, y1], [p, p1], [r, r1], ...)

    The graph is AOTAutograd's, of forward and backward together. Gradients are what they were: one
    [..., n, C] runs from site to site. Streams with other readers are written, and so are those of
    steps that the backward computes again, and those that no lazy kernel can read.
    """

    name: ClassVar[str] = "lazy-streams"
    length: int | None = None  # sites from one writing to the next; 1 changes nothing

    def apply(self, graph: Graph) -> Graph:
        """Return a copy with lazy operators, or the graph itself where all streams are written."""
        steps = graph.find_nodes(op="call_function", target=_STEP)
        if self.length == 1 or not any(map(_unwritten, steps)):
            return graph
        copy, _ = copy_graph(graph)
        held: dict[Node, _Sources] = {}  # by streams that are not written
        for node in list(copy.nodes):
            if node.target not in _READERS:
                continue
            lazy, position = _READERS[node.target]
            streams, branch, post, res, *rest = node.args[position:]
            sources = held.get(streams, _Sources(streams, (), (), ())).then(branch, post, res)
            many, new = len(sources.branches), None
            if node.target is _STEP:
                longest = ops.longest(known_tensor(branch).device)
                new = _unwritten(node) if many < min(self.length or longest, longest) else None
                if new is not None:
                    held[new] = sources
                rest.insert(3, new is None)
            if many > 1 or new is not None:
                _rewrite(node, lazy, (*node.args[:position], *sources.operands, *rest))
            if new is not None:
                packed = node.meta.get("val")
                if packed is not None:
                    node.meta["val"] = (packed[0].new_empty(0), *packed[1:])
        for streams in held:
            copy.erase_node(streams)
        return copy


def _unwritten(step: Node) -> Node | None:
    """Return the new streams of a step, if all readers can read their sources instead."""
    parts = [user for user in step.users if user.args[1:] == (0,)]
    if len(parts) != 1 or not _is_lazy(step, step.args[0], step):
        return None
    return parts[0] if all(_is_lazy(reader, parts[0], step) for reader in parts[0].users) else None


def _is_lazy(reader: Node, streams: Any, first: Node) -> bool:
    """Return whether `reader` takes `streams` as old streams, and a kernel their sources."""
    if reader.target not in _READERS or "recompute" in reader.meta:
        return False
    position = _READERS[reader.target][1]
    if reader.args.count(streams) != 1 or reader.args[position] is not streams:
        return False
    branches = [known_tensor(one.args[at]) for one, at in ((first, 1), (reader, position + 1))]  # type: ignore[arg-type]
    n, close = known_tensor(first.args[2]).shape[-1], reader.target in _CLOSES  # type: ignore[arg-type]
    return ops.is_lazy(known_tensor(streams), branches, n, str(first.args[7]), close=close)  # type: ignore[arg-type]


def _rewrite(node: Node, target: Any, args: tuple[Any, ...]) -> None:
    """Turn a node into one with the same results."""
    node.target, node.args = target, args
    node.meta.pop("eager_input_vals", None)
