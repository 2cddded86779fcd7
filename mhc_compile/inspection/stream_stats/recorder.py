"""Run rewritten graphs operation by operation, and record and reduce what every site does.

A chain is followed through the values of a graph, and between graphs by the memory of the streams,
which leave one graph as a result and enter the next as an input. The parameters of a site identify
its hyper-connection, because equivalent blocks share one graph. All figures are in float64.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx

from mhc_compile.inspection.stream_stats.results import ChainStability, Geometry, SiteStability, Weights
from mhc_compile.passes.transforms.checkpoint_regions import InlineRegions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mhc_compile.inspection.stream_stats.results import Matrix

#: Entries of streams that are converted to float64 at a time: 32 MB.
_CHUNK = 1 << 22
#: The operators with which a site reads the streams.
_READS = (torch.ops.mhc.coefficients.default, torch.ops.mhc.gated_read.default)


class Gates(NamedTuple):
    """Pre [n], post [n] and H_res [n, n] of a site, the same for all tokens."""

    pre: Tensor
    post: Tensor
    res: Tensor


class _At(NamedTuple):
    """A place in a chain: after the given number of its sites."""

    chain: _Chain
    site: int


class Recording:
    """The sites of one call of a model.

    `paths` are those of the hyper-connections, by the address of their second parameter, which is
    never empty; `starts` their gates at the start, by path, where they are known.
    """

    def __init__(self, paths: Mapping[int, str], starts: Mapping[str, Gates]) -> None:
        self.paths, self.starts = paths, starts
        self.chains: list[_Chain] = []
        self.seen: set[str] = set()
        self.dtype = ""
        #: Open branches by the address of res, which is kept so that its memory is not reused.
        self._pending: dict[int, tuple[str, Tensor | None, Tensor]] = {}
        self._leaving: list[tuple[weakref.ref[Tensor], _At]] = []

    def begin(self, parameter: Tensor, name: str, pre: Tensor | None, res: Tensor) -> None:
        """Record coefficients. The graph calls the parameter `name`; a gated read has no pre."""
        path = self.paths.get(address(parameter), name)
        self._pending[address(res)] = path, pre, res

    def site(self, at: _At | None, streams: Tensor, post: Tensor, res: Tensor, after: Tensor) -> _At:
        """Record an update of streams and return the place of the new ones."""
        if at is None or at.site != len(at.chain.sites):  # a second path from the same streams is another chain
            at = _At(_Chain(), 0)
        begun = self._pending.pop(address(res), None)
        if begun is None:  # a plain sum: the branch does not read these streams
            return at
        if not at.chain.sites:
            self.chains.append(at.chain)
        path, pre, _ = begun
        at.chain.add(path, pre, post, res, streams, after, self.starts.get(path))
        self.seen.add(path)
        self.dtype = self.dtype or str(streams.dtype).removeprefix("torch.")
        return _At(at.chain, at.site + 1)

    def leave(self, streams: Tensor, at: _At) -> None:
        """Record streams that leave a graph."""
        self._leaving = [(one, place) for one, place in self._leaving if one() is not None]
        self._leaving.append((weakref.ref(streams), at))

    def arrive(self, value: Any) -> _At | None:
        """Return the place of a graph input, if it is streams that left another graph."""
        if not isinstance(value, Tensor) or value.dim() < 3:
            return None
        for one, at in reversed(self._leaving):
            left = one()
            if left is not None and left.shape == value.shape and address(left) == address(value) != 0:
                return at
        return None


class Recorder(fx.Interpreter):
    """Runs a rewritten graph and passes its sites to the current `recording()`."""

    def __init__(self, graph_module: fx.GraphModule, recording: Callable[[], Recording]) -> None:
        flat = InlineRegions().apply(graph_module.graph)
        super().__init__(fx.GraphModule(flat.owning_module or graph_module, flat))
        self._recording = recording
        self._places: dict[fx.Node, tuple[_At, torch.Size | None]] = {}

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph, in which no chain has begun."""
        self._places = {}
        return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and note where its result is in a chain."""
        for operand in n.all_input_nodes if n.op == "output" else ():
            if operand in self._places and isinstance(value := self.env[operand], Tensor):
                self._recording().leave(value, self._places[operand][0])
        result = super().run_node(n)
        at = self._follow(n, result)
        if at is not None:
            self._places[n] = at, result.shape if isinstance(result, Tensor) else None
        return result

    def _follow(self, n: fx.Node, result: Any) -> _At | None:
        """Return the place of a node's result, None if it is not streams."""
        recording = self._recording()
        if n.op == "placeholder":
            return recording.arrive(result)
        if n.target in _READS:
            (_, _, parameter, *_), _ = self.fetch_args_kwargs_from_env(n)
            pre = result[0] if n.target is torch.ops.mhc.coefficients.default else None
            recording.begin(parameter, str(n.args[2]), pre, result[2])
            return None
        if n.target is torch.ops.mhc.update.default:
            (streams, _, post, res), _ = self.fetch_args_kwargs_from_env(n)
            source: Any = n.args[0]
            at = self._places[source][0] if source in self._places else None
            return recording.site(at, streams, post, res, result)
        known = [self._places[operand] for operand in n.all_input_nodes if operand in self._places]
        if not known or n.target is torch.ops.mhc.collapse.default:
            return None
        # A long skip reads older streams too: the chain continues from the newest.
        at, shape = max(known, key=lambda place: place[0].site)
        # From streams [..., n, C] to a value without them, [..., C]: a read-out.
        is_read_out = isinstance(result, Tensor) and shape is not None and result.shape == shape[:-2] + shape[-1:]
        return None if is_read_out else at


def address(value: Tensor) -> int:
    """Return the address of a tensor's memory, 0 if it has none."""
    return value.untyped_storage().data_ptr()


def has_sites(model: object) -> bool:
    """Return whether `model` is a graph module that was rewritten already."""
    graph = getattr(model, "graph", None)
    return isinstance(graph, fx.Graph) and any(node.target in _READS for node in graph.nodes)


@dataclass(eq=False)
class _Chain:
    """Reduces the sites of a chain one by one; keeps H_res [tokens, n, n], but no streams."""

    sites: list[SiteStability] = field(default_factory=list)
    width: int = 0
    merged: bool = False
    #: Every site's H_res, on the CPU.
    _matrices: list[Tensor] = field(default_factory=list)
    #: The composite of each token so far.
    _product: Tensor | None = None
    #: The streams that left the last site, while they exist, and their geometry.
    _left: tuple[weakref.ref[Tensor], Geometry] | None = None

    def add(
        self,
        path: str,
        pre: Tensor | None,
        post: Tensor,
        res: Tensor,
        streams: Tensor,
        after: Tensor,
        start: Gates | None,
    ) -> None:
        """Add a site: pre, post [..., n], res [..., n, n], streams [..., n, C] before and after."""
        self.width = streams.shape[-1]
        kept = res.detach().reshape(-1, *res.shape[-2:]).cpu()
        matrices = kept.double()
        # Token axes may be reshaped between sites, but keep their order and number.
        product = matrices if self._product is None else matrices @ self._fit(self._product, len(matrices))
        self._product = product
        self._matrices.append(kept)
        mean = matrices.mean(0)
        (forward, backward), (composite_forward, composite_backward) = _amax(matrices), _amax(product)
        left = self._left  # the geometry of streams that left the last site is known
        self.sites.append(
            SiteStability(
                path=path,
                tokens=len(matrices),
                mean=_rows(mean),
                spread=(matrices - mean).abs().amax().item(),
                composite=_rows(product.mean(0)),
                remainder=(),
                forward=forward,
                backward=backward,
                composite_forward=composite_forward,
                composite_backward=composite_backward,
                remainder_forward=0.0,
                remainder_backward=0.0,
                row_error=(matrices.sum(-1) - 1).abs().amax().item(),
                column_error=(matrices.sum(-2) - 1).abs().amax().item(),
                lowest=matrices.amin().item(),
                moved=_moved(start, pre, post, matrices) if start is not None and pre is not None else None,
                pre=_weights(pre) if pre is not None else None,
                post=_weights(post),
                entering=left[1] if left is not None and left[0]() is streams else geometry(streams),
            )
        )
        self._left = weakref.ref(after), geometry(after)

    def result(self) -> ChainStability:
        """Return the chain with the products from each site to the end."""
        product: Tensor | None = None
        sites = []
        for site, kept in zip(reversed(self.sites), reversed(self._matrices), strict=True):
            matrices = kept.double()
            product = matrices if product is None else self._fit(product, len(matrices)) @ matrices
            forward, backward = _amax(product)
            remainder = _rows(product.mean(0))
            sites.append(replace(site, remainder=remainder, remainder_forward=forward, remainder_backward=backward))
        assert self._left is not None
        return ChainStability(len(sites[0].mean), self.width, tuple(sites[::-1]), self._left[1], self.merged)

    def _fit(self, product: Tensor, tokens: int) -> Tensor:
        if len(product) == tokens:
            return product
        self.merged = True
        return product.mean(0, keepdim=True).expand(tokens, -1, -1)


def _amax(matrices: Tensor) -> tuple[float, float]:
    """Return largest absolute row sum (forward) and column sum (backward), averaged over tokens.

    Source: arXiv 2512.24880 v2, section 5.3, "Amax gain magnitude". Shape: [tokens, n, n].
    """
    absolute = matrices.abs()
    return (absolute.sum(-1).amax(-1).mean().item(), absolute.sum(-2).amax(-1).mean().item())


def _rows(matrix: Tensor) -> Matrix:
    return tuple(tuple(row) for row in matrix.tolist())


def _weights(values: Tensor) -> Weights:
    """Return the distribution over tokens of pre or post, [..., n]."""
    wide = values.detach().flatten(0, -2).cpu().double()
    moments = wide.mean(0), wide.std(0, correction=0), wide.amin(0), wide.amax(0)
    return Weights(*(tuple(moment.tolist()) for moment in moments))


def _moved(start: Gates, pre: Tensor, post: Tensor, matrices: Tensor) -> float:
    """Return the largest root mean square distance from the start, over tokens and entries."""
    now = pre.detach().cpu().double(), post.detach().cpu().double(), matrices
    return max((one - other).square().mean().sqrt().item() for one, other in zip(now, start, strict=True))


def geometry(streams: Tensor, chunk: int = _CHUNK) -> Geometry:
    """Return how far the streams [..., n, C] of a token differ from each other.

    Tokens whose streams are all zero (padding) have no direction and are excluded from similarity
    and rank. Values that are not finite give NaN. `chunk` entries at a time become float64.
    """
    n, width = streams.shape[-2:]
    flat = streams.detach().reshape(-1, n, width)
    size = max(chunk // max(n * width, 1), 1)
    deviation = trunk = 0.0
    grams = []
    for part in flat.split(size):
        wide = (part.cpu() if part.device.type == "mps" else part).double()  # there is no float64 on mps
        mean = wide.mean(-2, keepdim=True)
        deviation += (wide - mean).square().sum().item() / n
        trunk += mean.square().sum().item()
        grams.append((wide @ wide.mT).cpu())
    gram = torch.cat(grams)
    distance = (deviation / trunk) ** 0.5 if trunk > 0 else (math.inf if deviation > 0 else 0.0)
    if not bool(gram.isfinite().all()):
        return Geometry(math.nan, math.nan, math.nan)
    gram = gram[gram.diagonal(dim1=-2, dim2=-1).sum(-1) > 0]
    return Geometry(_similarity(gram), _rank(gram), distance) if len(gram) else Geometry(1.0, 1.0, distance)


def _similarity(gram: Tensor) -> float:
    n = gram.shape[-1]
    if n == 1:
        return 1.0
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).sqrt()
    cosines = gram / (norms.unsqueeze(-1) * norms.unsqueeze(-2))
    upper = torch.ones(n, n, dtype=torch.bool).triu(1)
    return float(cosines[:, upper].mean())


def _rank(gram: Tensor) -> float:
    """Return the exponential of the entropy of the normalised singular values.

    Those of the streams are the square roots of the eigenvalues of their Gram matrix. Source: Roy
    and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    eigenvalues = torch.linalg.eigvalsh(gram)
    floor = gram.shape[-1] * torch.finfo(torch.float64).eps * eigenvalues[:, -1:]  # rounding noise
    singular = torch.where(eigenvalues > floor, eigenvalues, 0.0).sqrt()
    share = singular / singular.sum(-1, keepdim=True)
    return float(torch.special.entr(share).sum(-1).exp().mean())
