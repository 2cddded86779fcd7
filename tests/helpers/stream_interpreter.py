"""An oracle for the rewrite: the plain graph, interpreted on lists of n separate trunk tensors.

Lifting an operation of the trunk means applying it to each stream; a site is computed from the
paper's equations (arXiv 2512.24880 v2, equations 5 to 9). The oracle reads only the plan of the
product (which nodes are on a trunk, where sites are) and the roles of operations. It uses no
`mhc::` operator and none of the code that lifts or writes operations. Compare at random parameters:
at the function-preserving start all streams are equal, and most faults of lifting are invisible.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from helpers.gates import faster
from torch import Tensor, fx

from mhc_compile.passes.analysis.op_info import is_contraction, op_name, passes_value
from mhc_compile.passes.transforms.expand_streams import ExpandStreams

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from mhc_compile.passes import Chain, Plan, Site
    from mhc_compile.passes.transforms.stream_builder import Binding

    Streams = list[Tensor]


@dataclass(frozen=True, eq=False)
class Expansion:
    """The arguments of one `ExpandStreams`: the normalised graph, its plan, the parameters of each
    site.
    """

    graph: fx.Graph
    plan: Plan
    bindings: dict[Site, Binding]
    #: Whether a branch begins or ends in another graph. The oracle does not know such graphs.
    cut: bool


@contextlib.contextmanager
def record_expansions() -> Iterator[list[Expansion]]:
    """Collect every expansion inside the `with` block, whichever front end asks for it."""
    seen: list[Expansion] = []
    apply = ExpandStreams.apply

    def record(self: ExpandStreams, graph: fx.Graph) -> fx.Graph:
        cut = bool(self.openings) or any(site.tail for site in self.plan.sites)
        seen.append(Expansion(graph, self.plan, dict(self.bindings), cut))
        return apply(self, graph)

    ExpandStreams.apply = record
    try:
        yield seen
    finally:
        ExpandStreams.apply = apply


class StreamInterpreter(fx.Interpreter):
    """Run the plain graph of an expansion on streams: the paper's convention, the mean as read-out.

    Definitions, for a chain of n streams:

        start       n copies of the trunk value that the first site reads
        trunk op    the operation applied to each stream, with the same other operands. All streams
                    see the random numbers of one plain call: one dropout mask
        batch norm  in training the statistics are those of the tokens of all streams together. The
                    running variance is corrected for N tokens, not n N, so that equal streams
                    move it as the plain model does
        site        X'_i = Σ_j res_ij X_j + post_i f(Σ_j pre_j X_j), coefficients from the streams
        of
                    the trunk; post and res from those of the shortcut where it has other tokens
        readers     the branch of a site reads the collapsed streams, everything else the mean of
        the
                    streams. An operation inside a stretch of trunk operations that is read from
                    outside is computed from such means, unless it draws random numbers or keeps
                    statistics: then its readers get the mean of its streams
        edges       streams [..., n, C] that arrive from other graphs are the last inputs, those
        that
                    leave are the last results

    Args:
        module: holds the attributes that the graph reads.
        expansion: graph, plan and parameters.
    """

    def __init__(self, module: torch.nn.Module, expansion: Expansion) -> None:
        super().__init__(module, garbage_collect_values=False, graph=expansion.graph)
        assert not expansion.cut
        self.bindings = expansion.bindings
        self.chain_of: dict[Site, Chain] = {}
        self.site_at: dict[fx.Node, Site] = {}
        self.sites_on: dict[fx.Node, list[Site]] = {}
        self.lifted: dict[fx.Node, list[tuple[Chain, dict[fx.Node, int]]]] = {}
        self.merged: set[fx.Node] = set()
        self.trunk_ends: set[fx.Node] = set()
        # Outer chains first. Where two sites claim one reader of a trunk value, the chain that
        # comes first has it.
        self.chains = sorted(expansion.plan.chains, key=lambda chain: (chain.start, -len(chain.sites[0].branch)))
        for chain in self.chains:
            for departure in chain.departures:
                for node in departure.nodes:
                    self.lifted.setdefault(node, []).append((chain, departure.axes))
            for site, link in zip(chain.sites, chain.links, strict=True):
                self.chain_of[site], self.site_at[site.add] = chain, site
                self.sites_on.setdefault(site.trunk, []).append(site)
                self.merged.update(site.adds[:-1])
                self.trunk_ends.update(link.nodes[-1:])
                for stretch in (link, site.shortcut):
                    for node in stretch.nodes:
                        self.lifted.setdefault(node, []).append((chain, stretch.axes))

    def run(self, *args: Any) -> Any:
        """Return what the graph returns, and the streams that go on in other graphs."""
        self.trunk: dict[tuple[Chain, fx.Node], Streams] = {}
        self.opened: dict[Site, tuple[Tensor, Streams, list[Streams]]] = {}
        #: Nodes that draw random numbers or keep statistics.
        self.once: set[fx.Node] = set()
        own = len(self.graph.find_nodes(op="placeholder"))
        for chain, streams in zip((chain for chain in self.chains if chain.arrives), args[own:], strict=True):
            axis = chain.links[0].axes[chain.start]
            self.trunk[chain, chain.start] = [x.movedim(-1, axis) for x in streams.unbind(-2)]
        results = super().run(*args[:own])
        leaving = [
            torch.stack([x.movedim(departure.axes[end], -1) for x in self.trunk[chain, end]], -2)
            for chain in self.chains
            for departure in chain.departures
            for end in list(departure.axes)[-1:]
        ]
        return (*results, *leaving) if leaving else results

    def run_node(self, n: fx.Node) -> Any:
        """Return the plain value of a node: for trunk values the mean of their streams."""
        if n in self.merged:
            return None
        if n in self.site_at:
            return self._mean(self._close(self.site_at[n]))
        before, own = torch.get_rng_state(), None
        for chain, axes in self.lifted.get(n, ()):
            torch.set_rng_state(before)
            own = self.trunk[chain, n] = self._lift(chain, n, axes)
        value = None if own is not None else self._call(n, lambda operand: self._read(operand, n))
        if op_name(n) == "batch_norm" or not torch.equal(before, torch.get_rng_state()):
            self.once.add(n)
        if own is None:
            return value
        if n in self.trunk_ends or n in self.once:
            return self._mean(own)
        return self._call(n, lambda operand: self._read(operand, n))

    def _call(self, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
        if node.op == "output":
            return fx.map_arg(node.args[0], value)
        return getattr(self, node.op)(node.target, fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value))

    def _read(self, operand: fx.Node, reader: fx.Node) -> Any:
        """Return the value of `operand` that `reader` gets: the innermost site's collapsed
        streams.
        """
        site = self._around(operand, reader)
        return self.env[operand] if site is None else self._open(site)[0]

    def _around(self, operand: fx.Node, reader: fx.Node, until: Chain | None = None) -> Site | None:
        """Return the innermost site on `operand` with `reader` in its branch, of chains before
        `until`.
        """
        found = None
        for site in self.sites_on.get(operand, ()):
            if self.chain_of[site] is until:
                break
            if reader in site.branch and self._outer(site) is found:
                found = site
        return found

    def _outer(self, site: Site) -> Site | None:
        """Return the site whose branch a chain begins in that begins with `site`."""
        chain = self.chain_of[site]
        if site is not chain.sites[0] or site.trunk is not chain.start:
            return None
        reader = next(one for one in (*site.shortcut.nodes[:1], *site.adds) if site.trunk in one.all_input_nodes)
        return self._around(site.trunk, reader, until=chain)

    def _streams(self, chain: Chain, node: fx.Node) -> Streams | None:
        """Return the streams of a trunk value, None if the node is none of this chain."""
        if node is chain.start and (chain, node) not in self.trunk:
            outer = self._outer(chain.sites[0])
            begun = self.env[node] if outer is None else self._open(outer)[0]
            self.trunk[chain, node] = [begun] * self.bindings[chain.sites[0]].streams
        return self.trunk.get((chain, node))

    def _open(self, site: Site) -> tuple[Tensor, Streams, list[Streams]]:
        """Return `(h, post, res)` of a site: the input of its branch, and the weights of its
        update.
        """
        if site not in self.opened:
            streams = self._streams(self.chain_of[site], site.trunk)
            pre, post, res = self._coefficients(site, streams, site.shortcut.axes[site.trunk])
            self.opened[site] = sum(p * x for p, x in zip(pre, streams, strict=True)), post, res
        return self.opened[site]

    def _close(self, site: Site) -> Streams:
        """Return the new streams of a site."""
        chain = self.chain_of[site]
        _, post, res = self._open(site)
        shortcut, trunk = self._streams(chain, site.skip), self._streams(chain, site.trunk)
        if _tokens(shortcut[0], site.axis) != _tokens(trunk[0], site.shortcut.axes[site.trunk]):
            # A pooled or sliced shortcut has tokens of its own, whose weights are computed from
            # them.
            _, post, res = self._coefficients(site, shortcut, site.axis)
        readers = {term: next(add for add in site.adds if term in add.all_input_nodes) for term in site.branch_outputs}
        branch = sum(self._read(term, reader) for term, reader in readers.items())
        dtype = torch.result_type(shortcut[0], branch)
        new = []
        for i in range(len(trunk)):
            mixed = sum(res[i][j].to(dtype) * old.to(dtype) for j, old in enumerate(shortcut))
            new.append(mixed + post[i].to(dtype) * branch)
        self.trunk[chain, site.add] = new
        return new

    def _coefficients(self, site: Site, streams: Streams, axis: int) -> tuple[Streams, Streams, list[Streams]]:
        """Return pre [n], post [n] and res [n][n], each with the layout of the trunk and one
        feature.
        """
        binding, n = self.bindings[site], len(streams)
        assert (binding.spec, binding.gated, binding.single_pass, binding.end.kind) == (
            "sinkhorn;gate_speed=32.0;scale_speed=0.0078125",
            False,
            False,
            "mean",
        )
        dtype = torch.promote_types(streams[0].dtype, torch.float32)
        phi, bias, scale = (self._parameter(name).to(dtype) for name in (binding.phi, binding.bias, binding.scale))
        bias, scale = faster(bias, 32), scale / 128
        v = torch.cat([x.movedim(axis, -1) for x in streams], -1).to(dtype)
        z = (v @ phi) / torch.sqrt((v * v).mean(-1, keepdim=True) + binding.eps)
        pre = 1 / (1 + torch.exp(-(scale[0] * z[..., :n] + bias[:n])))
        post = 2 / (1 + torch.exp(-(scale[1] * z[..., n : 2 * n] + bias[n : 2 * n])))
        res = torch.exp(scale[2] * z[..., 2 * n :] + bias[2 * n :]).unflatten(-1, (n, n))
        for _ in range(binding.iterations):
            res = res / res.sum(-2, keepdim=True)
            res = res / res.sum(-1, keepdim=True)

        def each(weights: Tensor) -> Streams:
            return [weight.unsqueeze(axis) for weight in weights.unbind(-1)]

        return each(pre), each(post), [each(row) for row in res.unbind(-2)]

    def _parameter(self, name: fx.Node | str) -> Tensor:
        return self.env[name] if isinstance(name, fx.Node) else self.fetch_attr(name)

    def _lift(self, chain: Chain, node: fx.Node, axes: dict[fx.Node, int]) -> Streams:
        """Return a trunk operation applied to each stream."""
        own = {o: self._streams(chain, o) for o in node.all_input_nodes if o in axes}
        older = {o: s for o in node.all_input_nodes if o not in axes and (s := self._older(chain, o)) is not None}
        if op_name(node) == "batch_norm" and axes[node] == 1:
            return self._batch_norm(node, next(iter(own.values())))
        return self._on_each(node, own | older)

    def _on_each(self, node: fx.Node, operands: dict[fx.Node, Streams]) -> Streams:
        state, results = torch.get_rng_state(), []
        for streams in zip(*operands.values(), strict=True):
            torch.set_rng_state(state)
            given = dict(zip(operands, streams, strict=True))
            results.append(self._call(node, lambda o, given=given: given[o] if o in given else self._read(o, node)))
        return results

    def _older(self, chain: Chain, node: fx.Node) -> Streams | None:
        """Return the streams of an older trunk value, or of one cheap operation on it.

        A long skip adds streams to streams.
        """
        streams = self._streams(chain, node)
        plain = node in self.site_at or node in self.once or node.op == "placeholder"
        if streams is not None or plain or is_contraction(node) or not passes_value(node):
            return streams
        behind = {o: s for o in node.all_input_nodes if (s := self._streams(chain, o)) is not None}
        return self._on_each(node, behind) if len(behind) == 1 else None

    def _batch_norm(self, node: fx.Node, streams: Streams) -> Streams:
        names = "input running_mean running_var weight bias training momentum eps".split()
        if node.target is not torch.nn.functional.batch_norm:  # ATen's order
            names = "input weight bias running_mean running_var training momentum eps cudnn_enabled".split()
        given = dict.fromkeys(names) | dict(zip(names, node.args, strict=False)) | node.kwargs
        given = fx.map_arg({**given, "input": None}, lambda operand: self._read(operand, node))
        x, n = torch.cat(streams), len(streams)
        tokens, shape = [0, *range(2, x.dim())], [1, -1, *[1] * (x.dim() - 2)]
        mean, var = given["running_mean"], given["running_var"]
        if given["training"]:
            momentum, count = given["momentum"], x.numel() // x.shape[1] // n
            old_mean, old_var = mean, var
            mean, var = x.mean(tokens), x.var(tokens, correction=0)
            if old_mean is not None:
                with torch.no_grad():
                    old_mean.copy_((1 - momentum) * old_mean + momentum * mean)
                    old_var.copy_((1 - momentum) * old_var + momentum * var * count / (count - 1))
        out = (x - mean.view(shape)) / torch.sqrt(var.view(shape) + given["eps"])
        if given["weight"] is not None:
            out = out * given["weight"].view(shape)
        if given["bias"] is not None:
            out = out + given["bias"].view(shape)
        return list(out.chunk(n))

    @staticmethod
    def _mean(streams: Streams) -> Tensor:
        return sum(streams) / len(streams)


def _tokens(value: Tensor, axis: int) -> list[int]:
    return [size for position, size in enumerate(value.shape) if position != axis]
