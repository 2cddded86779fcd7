"""Runs rewritten graphs operation by operation, and takes down what every site does.

A chain is followed through the values of a graph, and from graph to graph by the memory of the streams, which leave one graph as a result and enter
the next as an input. Which hyper-connection a site has, its parameters tell: blocks that look alike share one graph.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx

from mhc_compile.inspection.stream_stats.chains import Chain
from mhc_compile.inspection.stream_stats.moments import weights
from mhc_compile.passes.transforms.checkpoint_regions import InlineRegions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mhc_compile.inspection.stream_stats.result import Weights

__all__ = ["Recording", "address", "recorder"]


class _At(NamedTuple):
    """A place in a chain: behind how many of its sites."""

    chain: Chain
    site: int


class _Pending(NamedTuple):
    """A branch that has begun: whose it is, what it reads, and its res, kept so that its memory is no other's meanwhile."""

    path: str
    pre: Weights | None
    res: Tensor


class Recording:
    """What is taken down in one call of a model.

    Args:
        paths: of the hyper-connections, by the address of their second parameter, which is never empty (see `address`).
    """

    def __init__(self, paths: Mapping[int, str]) -> None:
        self.paths = paths
        self.chains: list[Chain] = []
        self.seen: set[str] = set()
        self.dtype = ""
        self._pending: dict[int, _Pending] = {}
        self._leaving: list[tuple[weakref.ref[Tensor], _At]] = []

    def begin(self, parameter: Tensor, name: str, pre: Tensor | None, res: Tensor) -> None:
        """Coefficients were computed, with a second parameter that the graph calls `name`. A gated read has no pre."""
        path = self.paths.get(address(parameter), name)
        self._pending[address(res)] = _Pending(path, weights(pre) if pre is not None else None, res)

    def site(self, at: _At | None, streams: Tensor, post: Tensor, res: Tensor, after: Tensor) -> _At:
        """Streams were updated; returns the place of the new ones."""
        if at is None or at.site != len(
            at.chain.sites
        ):  # a second way that leaves the same streams is a chain of its own
            at = _At(Chain(), 0)
        begun = self._pending.pop(address(res), None)
        if begun is None:  # a branch that did not begin on these streams: a plain sum
            return at
        if not at.chain.sites:
            self.chains.append(at.chain)
        at.chain.add(begun.path, begun.pre, post, res, streams, after)
        self.seen.add(begun.path)
        self.dtype = self.dtype or str(streams.dtype).removeprefix("torch.")
        return _At(at.chain, at.site + 1)

    def leave(self, streams: Tensor, at: _At) -> None:
        """Streams leave a graph."""
        self._leaving = [(one, place) for one, place in self._leaving if one() is not None]
        self._leaving.append((weakref.ref(streams), at))

    def arrive(self, value: Any) -> _At | None:
        """The place of what enters a graph, if it is streams that left another one."""
        if not isinstance(value, Tensor) or value.dim() < 3:
            return None
        for one, at in reversed(self._leaving):
            left = one()
            if left is not None and left.shape == value.shape and address(left) == address(value) != 0:
                return at
        return None


class _Recorder(fx.Interpreter):
    """Runs a rewritten graph and tells a recording of its sites."""

    def __init__(self, graph_module: fx.GraphModule, recording: Callable[[], Recording]) -> None:
        flat = InlineRegions().apply(graph_module.graph)
        super().__init__(fx.GraphModule(flat.owning_module or graph_module, flat))
        self._recording = recording
        self._places: dict[fx.Node, tuple[_At, torch.Size | None]] = {}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self._places = {}
        return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            self._leave(n)
        result = super().run_node(n)
        at = self._follow(n, result)
        if at is not None:
            self._places[n] = at, result.shape if isinstance(result, Tensor) else None
        return result

    def _follow(self, n: fx.Node, result: Any) -> _At | None:
        """The place of a node's result, None if it is not streams."""
        recording = self._recording()
        if n.op == "placeholder":
            return recording.arrive(result)
        if n.target is torch.ops.mhc.coefficients.default:
            (_, _, bias, *_), _ = self.fetch_args_kwargs_from_env(n)
            recording.begin(bias, str(n.args[2]), result[0], result[2])
            return None
        if n.target is torch.ops.mhc.gated_read.default:
            (_, _, norm, *_), _ = self.fetch_args_kwargs_from_env(n)
            recording.begin(norm, str(n.args[2]), None, result[2])
            return None
        if n.target is torch.ops.mhc.collapse.default:
            return None
        if n.target is torch.ops.mhc.update.default:
            (streams, _, post, res), _ = self.fetch_args_kwargs_from_env(n)
            source: Any = n.args[0]
            at = self._places[source][0] if source in self._places else None
            return recording.site(at, streams, post, res, result)
        known = [self._places[operand] for operand in n.all_input_nodes if operand in self._places]
        if not known:
            return None
        # A long skip brings older streams along: the chain goes on from the newest.
        at, shape = max(known, key=lambda place: place[0].site)
        return None if _is_read_out(result, shape) else at

    def _leave(self, n: fx.Node) -> None:
        for operand in n.all_input_nodes:
            if operand in self._places and isinstance(value := self.env[operand], Tensor):
                self._recording().leave(value, self._places[operand][0])


def recorder(graph_module: fx.GraphModule, recording: Callable[[], Recording]) -> Callable[..., Any]:
    """The graph as a function that tells `recording()`, whatever that is at the time, of the sites it passes."""
    return _Recorder(graph_module, recording).run


def address(value: Tensor) -> int:
    """Where a tensor's memory is: 0 if it has none."""
    return value.untyped_storage().data_ptr()


def _is_read_out(result: Any, streams: torch.Size | None) -> bool:
    """Whether of streams [..., n, C] something was made that has no streams: [..., C]."""
    return isinstance(result, Tensor) and streams is not None and result.shape == streams[:-2] + streams[-1:]
