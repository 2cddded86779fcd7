"""Rewrite the chains of a plan to parallel streams."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch

from mhc_compile.errors import AttachError
from mhc_compile.passes.analysis.op_info import is_update, known_tensor, runs_once, tensor_value
from mhc_compile.passes.core.emit import mark_copies
from mhc_compile.passes.core.pass_base import Pass, copy_graph
from mhc_compile.passes.planning.graph_boundary import BranchInput, BranchOutput, StreamOutput, crossings
from mhc_compile.passes.transforms.path_builder import PathBuilder
from mhc_compile.passes.transforms.stream_builder import End

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.fx import Graph, Node

    from mhc_compile.passes.lifting.trunk_path import TrunkPath
    from mhc_compile.passes.planning.plan import BranchHead, Chain, Plan
    from mhc_compile.passes.planning.verdict import Site
    from mhc_compile.passes.transforms.stream_builder import Binding


@dataclass(frozen=True)
class ExpandStreams(Pass):
    """Replace the residual adds of every chain by hyper-connections on persistent streams.

    before: h1 = f(x0); x1 = torch.add(x0, h1); h2 = g(x1); x2 = torch.add(x1, h2); out = norm(x2)

    after:  S0 = x0.unsqueeze(-2).expand(-1, ..., n, -1)
            pre, post, res, _ = mhc.coefficients(S0, phi, bias, scale); x = mhc.collapse(S0, pre)
            h1 = f(x); S1 = mhc.update(S0, h1, post, res)
            (the same for g, giving S2)
            out = norm(S2.mean(-2))

    Streams start as copies and end as their mean. A reader of a trunk value inside the branch of
    its site gets the collapsed streams; every other reader (a final norm, a hidden state that is
    returned) gets the mean of the streams at that point. Trunk operations between two sites run on
    the streams.

    A chain may also end with the sum or with a learned read-out (`Binding.end`); in a single pass
    (`Binding.single_pass`) the weights of one site collapse the streams for the next,
    `mhc.collapse(S1, pre)`, and the first one reads x0.

    Where a chain comes from another graph, S0 is a new graph input; where it goes on in another
    one, S2 is an additional result. `graph_boundary.crossings` lists both.
    """

    name: ClassVar[str] = "expand-streams"

    #: The plan, made on the very graph that `apply` receives.
    plan: Plan
    #: Parameters for every site of the plan.
    bindings: Mapping[Site, Binding]
    #: Names and parameters of the branches that begin here and end in other graphs.
    openings: Mapping[BranchHead, tuple[str, Binding]] = field(default_factory=dict)

    def apply(self, graph: Graph) -> Graph:
        """Return a copy of `graph` on streams."""
        copy, nodes = copy_graph(graph)
        expansion = _Expansion(copy, nodes, self.bindings, self.openings)
        # Outer chains first: a chain in the branch of an outer site then starts from the streams
        # collapsed for that branch. The outer chain starts no later, and of two that start at one
        # value the outer one has the larger branch.
        for chain in sorted(self.plan.chains, key=lambda chain: (chain.start, -len(chain.sites[0].branch))):
            expansion.run(chain)
        expansion.open_alone()
        expansion.sweep()
        expansion.depart()
        self._check(graph, copy)
        return copy

    def _check(self, before: Graph, after: Graph) -> None:
        """Check that each site writes the streams once, and each branch begins or ends once.

        Raises:
            RuntimeError: the expansion lost a site, a fault of this package.
        """
        arrivals, departures = crossings(after)
        done = {
            "sites": sum(map(is_update, after.nodes)) - sum(map(is_update, before.nodes)),
            "ends of branches": sum(isinstance(arrival, BranchInput) for arrival in arrivals),
            "beginnings of branches": sum(isinstance(departure, BranchOutput) for departure in departures),
        }
        tails = 2 * sum(site.tail for site in self.plan.sites)  # post and res
        planned = dict(zip(done, (len(self.plan.sites), tails, len(self.openings)), strict=True))
        if done != planned:
            raise RuntimeError(f"the graph was planned with {planned}, and its expansion has {done}")


@dataclass(frozen=True)
class RemoveDeclarations(Pass):
    """Remove the declarations of parameters from the graph: the parameters are graph inputs by now.

    before: mhc.declare(phi, bias, scale)              after: (nothing)
    """

    name: ClassVar[str] = "remove-declarations"

    def apply(self, graph: Graph) -> Graph:
        """Return a copy of `graph` without `mhc::declare`, or the graph itself if it has none."""
        return without_declarations(graph)


def without_declarations(graph: Graph) -> Graph:
    """Return a copy of `graph` without `mhc::declare`, or the graph itself if it has none."""
    declarations = (torch.ops.mhc.declare, torch.ops.mhc.declare.default)
    if not any(node.target in declarations for node in graph.nodes):
        return graph
    copy, _ = copy_graph(graph)
    for node in [node for node in copy.nodes if node.target in declarations]:
        copy.erase_node(node)
    return copy


class _Expansion(PathBuilder):
    """Expands chains in place, in a copy of the graph."""

    def __init__(
        self,
        graph: Graph,
        nodes: dict[Node, Node],
        bindings: Mapping[Site, Binding],
        openings: Mapping[BranchHead, tuple[str, Binding]],
    ) -> None:
        super().__init__(graph, nodes, openings, sums={add for site in bindings for add in site.adds})
        self.bindings = bindings
        #: Trunk values that another chain has replaced by the mean of its streams.
        self.replaced: dict[Node, Node] = {}
        #: What readers inside the chain at hand get of its streams.
        self.between = End()
        #: The weights of the last site, where they collapse the streams for the next one.
        self.passed: Node | None = None
        #: Trunk operations that were lifted and are read elsewhere as well.
        self.lifted: list[Node] = []

    def run(self, chain: Chain) -> None:
        first = chain.sites[0]
        start = self._start(first)
        ready = start if first.ready is first.trunk else max(start, self.nodes[first.ready])
        self._follow(ready, like=self.nodes[first.add])
        if chain.arrives:
            axis = chain.links[0].axes[chain.start]
            streams = self._arrive(chain.start, axis, self.bindings[first].streams, first.path)
            self._open(chain.start, streams)
        else:
            streams = self._copies(start, first)
        stages: list[tuple[Site, TrunkPath, dict[Node, Node], Node]] = []
        self.known = {}
        self.between, self.passed = self.bindings[first].end.between, None
        for site, link in zip(chain.sites, chain.links, strict=True):
            lifted = self._lift(link, streams)
            entry = lifted[site.trunk]
            if entry is not streams or site is not first:
                self._follow(entry, like=self.nodes[site.add])
            begins = site is first and not link.nodes
            streams = self._site(site, start if begins else self.nodes[site.trunk], entry, lifted)
            self.known[site.add] = streams, site.axis
            stages.append((site, link, lifted, streams))
        for departure in chain.departures:
            self._leave(chain.sites[-1], departure, streams)
        self._open(chain.sites[-1].add, streams)
        # backwards: a value's readers are counted after those that disappear are gone
        for site, link, lifted, after in reversed(stages):
            last = self.bindings[site] if site is chain.sites[-1] else None
            self._read_out(self.nodes[site.add], after, site.axis, last)
            for inner in reversed(site.adds[:-1]):
                self.graph.erase_node(self.nodes[inner])
            self._dispose(site.shortcut, lifted)
            if link.nodes:
                self._read_out(self.nodes[site.trunk], lifted[site.trunk], link.axes[site.trunk])
                self._dispose(link, lifted)

    def sweep(self) -> None:
        """Erase the trunk operations whose other readers belonged to a later chain."""
        for node in sorted(self.lifted, reverse=True):
            if node not in self.replaced and not node.users:
                self.graph.erase_node(node)

    def _leave(self, site: Site, departure: TrunkPath, streams: Node) -> None:
        target = list(departure.axes)[-1]
        self._follow(max(streams, self.nodes[site.add]), like=self.nodes[site.add])
        lifted = self._lift(departure, streams)
        old = self.nodes[target]
        once = bool(departure.nodes) and runs_once(old)
        if once:
            self._read_out(old, lifted[target], departure.axes[target])
        axis, mean = departure.axes[target] - known_tensor(target).dim(), once or not departure.nodes
        note = partial(StreamOutput, self.results[target], axis=axis, path=site.path, mean=mean)
        self.leaving.append(((lifted[target],), note))

    def _copies(self, start: Node, first: Site) -> Node:
        rank, n = known_tensor(start).dim(), self.bindings[first].streams
        trunk = self._features_last(start, first.shortcut.axes[first.trunk])
        wide = self._emit("trunk", "call_method", "unsqueeze", (trunk, -2))
        streams = self._emit("streams", "call_method", "expand", (wide, *[-1] * (rank - 1), n, -1))
        mark_copies(streams)
        return streams

    def _dispose(self, trunk_path: TrunkPath, lifted: dict[Node, Node]) -> None:
        """Erase the trunk operations without readers. One that is read elsewhere reads the mean.

        An operation that draws random numbers or keeps statistics must run once: its readers get
        the streams' mean instead.
        """
        for node in reversed(trunk_path.nodes):
            old = self.nodes[node]
            if old in self.replaced:
                continue
            if not old.users:
                self.graph.erase_node(old)
                self.replaced[old] = old
                continue
            self.lifted.append(old)
            if runs_once(old):
                self._read_out(old, lifted[node], trunk_path.axes[node])

    def _start(self, site: Site) -> Node:
        """Return the trunk value that a chain starts from, as its first reader reads it now."""
        readers = (*site.shortcut.nodes[:1], *site.adds)
        now = (new for reader in readers for old, new in self._operands(reader) if old is site.trunk)
        start = next(now, None)
        assert start is not None, f"{site}: none of {readers} reads its trunk {site.trunk}"
        return start

    def _site(self, site: Site, trunk: Node, streams: Node, lifted: dict[Node, Node]) -> Node:
        add, axis = self.nodes[site.add], site.shortcut.axes[site.trunk]
        branch = {self.nodes[node] for node in site.branch}
        readers = [user for user in trunk.users if user in branch]
        if readers:
            # before their first reader, where the branch's gradient mode holds (no_grad)
            self._follow(min(readers).prev, like=add)
        if site.tail:
            post, res = self._close(site, streams)
        else:
            collapsed, post, res = self._begin(site, streams)
            collapsed = self._features_back(collapsed, axis, trunk)
        # before the branch reads collapsed streams: it may read an operation of the shortcut
        if site.shortcut.nodes:
            lifted.update(self._lift(site.shortcut, streams))
        for reader in readers:
            reader.replace_input_with(trunk, collapsed)
        self._follow(add.prev, like=add)
        carried = lifted[site.skip]
        if _tokens(carried) != _tokens(streams):
            # The shortcut has other tokens than the branch reads: they get their own weights.
            _, pre, post, res = self._read(self.bindings[site], carried)
            if self.bindings[site].single_pass:
                self.passed = pre
        total = self._now(site.branch_outputs[0])
        for term in site.branch_outputs[1:]:
            total = self._call("branches", torch.add, total, self._now(term))
        return self._update(site, carried, total, post, res)

    def _begin(self, site: Site, streams: Node) -> tuple[Node, Node, Node]:
        """Write the input of the branch of `site`, and return it with the weights post and res."""
        binding = self.bindings[site]
        if not binding.single_pass:
            collapsed, _, post, res = self._read(binding, streams)
            return collapsed, post, res
        passed = self.passed
        self.passed, post, res = self._coefficients(binding, streams)
        if passed is None:
            return self._emit("collapsed", "call_method", "select", (streams, -2, 0)), post, res
        if _tokens(streams) != _tokens(passed, 1):
            raise AttachError(
                f"{site}: single_pass=True reads with the weights of the site before, and on the way from there the tokens change (a pool, a"
                " merge, a slice). Use single_pass=False for this model"
            )
        return self._call("collapsed", torch.ops.mhc.collapse.default, streams, passed), post, res

    def _update(self, site: Site, streams: Node, branch: Node, post: Node, res: Node) -> Node:
        """Write the new streams, in the dtype of the plain sum. The branch may be broadcast."""
        total, value, wide = known_tensor(self.nodes[site.add]), tensor_value(branch), tensor_value(streams)
        if wide is not None and wide.dtype != total.dtype:
            streams = self._emit("streams", "call_method", "to", (streams, total.dtype))
        if value is not None and value.shape != total.shape:
            like = self._emit("like", "call_method", "select", (streams, -2, 0))
            if site.axis != total.dim() - 1:
                like = self._emit("like", "call_method", "movedim", (like, -1, site.axis))
            branch = self._emit("branch", "call_method", "expand_as", (branch, like))
        features = self._features_last(branch, site.axis)
        return self._call("streams", torch.ops.mhc.update.default, streams, features, post, res)

    def _read_out(self, value: Node, streams: Node, axis: int, last: Binding | None = None) -> None:
        """Let readers of a trunk value read its streams' result. `last`: of the last site."""
        self.replaced[value] = value
        if value.users:
            self._follow(streams, like=value)
            end, eps = (last.end, last.eps) if last is not None else (self.between, 0.0)
            out = self._end(end, eps, streams, self.passed)
            mean = self._features_back(out, axis, value)
            value.replace_all_uses_with(mean)
            self.replaced[value] = mean
        self.graph.erase_node(value)

    def _now(self, node: Node) -> Node:
        """Return the current replacement of a node of the plan's graph."""
        copy = self.nodes[node]
        return self.replaced.get(copy, copy)


def _tokens(streams: Node, more: int = 2) -> list[str]:
    """Return the token axes of streams as text: sizes may be symbolic. `more`: axes that follow."""
    value = tensor_value(streams)
    return [] if value is None else [str(size) for size in value.shape[:-more]]
