"""Results of `explain` and `why`: verdicts on the additions of a model, and the cost.

A `SiteReport` or a `RejectionReport` is one verdict in short, for `explain`. `SiteDetail` and
`RejectionDetail` are the same verdicts with the operations around the addition, for `why`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mhc_compile.inspection.roofline import Overhead, overheads
from mhc_compile.reporting.base import Renderable

if TYPE_CHECKING:
    from mhc_compile.config.options import ResolvedOptions
    from mhc_compile.inspection.cost import Cost, Work


@dataclass(frozen=True)
class SiteReport:
    """One residual add that becomes a hyper-connection.

    Attributes:
        path: of its parameters below the model: "transformer.h.0.mhc.attn".
        owner: path of the module that performs the add; "" is the model itself.
        owner_kind: class of that module.
        branch: path of the branch below the owner: "attn".
        index: position in the chain, from 0. At init the branch prefers stream index mod n.
        width: C.
        adds: number of additions in the sum (2 for parallel attention and MLP).
        source: `file:line` of the add in the model's code, "" if the tracer did not record it.
    """

    path: str
    owner: str
    owner_kind: str
    branch: str
    index: int
    width: int
    adds: int
    source: str


@dataclass(frozen=True)
class ChainReport:
    """Sites that share one set of streams in one graph.

    Attributes:
        sites: in order.
        width: C.
        lifted: names of the trunk operations that run on all streams.
        arrives: the streams come from another graph, or start as copies of a graph input.
        departs: the streams may continue in another graph.
    """

    sites: tuple[SiteReport, ...]
    width: int
    lifted: tuple[str, ...]
    arrives: bool
    departs: bool


@dataclass(frozen=True)
class RejectionReport:
    """One addition that is skipped.

    Attributes:
        add: name of its node in the graph.
        module: path of the module that performs it.
        reason: code of the reason (`mhc_compile.passes.Reason`).
        message: the finding that led to it.
        source: `file:line` of the add in the model's code, "" if the tracer did not record it.
    """

    add: str
    module: str
    reason: str
    message: str
    source: str


@dataclass(frozen=True)
class GraphReport:
    """One graph that Dynamo made of the model. Equal blocks that share a graph have a report each.

    Attributes:
        module: path of the module whose method, or a part of it, the graph is; "" is the model.
        nodes: number of nodes.
        chains: chains that are rewritten.
        rejections: all other additions of two floating-point tensors.
        regions: higher-order operations (`cond`, `invoke_subgraph`) whose inner graphs are not
            analyzed. Sites under activation checkpointing are among the chains.
        tokens: tokens in the example inputs, as the chains count them (batch × sequence); 0 without
            a chain, and if chains have different numbers of them (an encoder and a decoder).
        flops: of one forward pass of the plain graph with the example inputs, None if unknown.
    """

    module: str
    nodes: int
    chains: tuple[ChainReport, ...]
    rejections: tuple[RejectionReport, ...]
    regions: tuple[str, ...]
    tokens: int
    flops: int | None


@dataclass(frozen=True)
class Explanation(Renderable):
    """The rewrite of a model by `backend="mhc"` and its cost, printed by rich.

    Attributes:
        model: class name.
        options: the options it was made for.
        graphs: one report per graph, and per block where blocks share one; a graph break gives
            several.
        cost: cost of all sites, per token and forward pass.
        parameters: number of parameters of the plain model.
        plain: work of one forward pass of the plain model with the example inputs, None if its
            FLOPs are unknown.
        added: work of the sites beyond their plain adds in such a pass, as they are lowered now.
        floor: the same, if every site moved no more bytes than it must.
    """

    model: str
    options: ResolvedOptions
    graphs: tuple[GraphReport, ...]
    cost: Cost
    parameters: int
    plain: Work | None
    added: Work
    floor: Work

    @property
    def chains(self) -> tuple[ChainReport, ...]:
        """The chains of all graphs."""
        return tuple(chain for graph in self.graphs for chain in graph.chains)

    @property
    def sites(self) -> tuple[SiteReport, ...]:
        """The sites of all chains."""
        return tuple(site for chain in self.chains for site in chain.sites)

    @property
    def rejections(self) -> tuple[RejectionReport, ...]:
        """The skipped additions of all graphs."""
        return tuple(rejection for graph in self.graphs for rejection in graph.rejections)

    @property
    def regions(self) -> Counter[str]:
        """Number of higher-order operations that are not analyzed, by name."""
        return Counter(region for graph in self.graphs for region in graph.regions)

    @property
    def reasons(self) -> Counter[str]:
        """Number of rejections by reason."""
        return Counter(rejection.reason for rejection in self.rejections)

    @property
    def plain_flops_per_token(self) -> float | None:
        """Forward FLOPs of the plain model per token.

        None if they are unknown, or if the chains of a graph have different numbers of tokens.
        """
        counted = [graph for graph in self.graphs if graph.chains]
        if not counted or any(graph.flops is None or not graph.tokens for graph in counted):
            return None
        return sum(graph.flops / graph.tokens for graph in counted if graph.flops is not None)

    @property
    def overheads(self) -> tuple[Overhead, ...]:
        """Estimated overhead of a step on known machines (see `mhc_compile.inspection.roofline`).

        Empty without sites, and if the plain model's FLOPs are unknown.
        """
        return overheads(self.plain, self.added, self.floor) if self.plain is not None and self.sites else ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, `reasons`, `plain_flops_per_token` and `overheads` as JSON data."""
        work = {"plain": self.plain, "added": self.added, "floor": self.floor}
        return {
            "model": self.model,
            "options": self.options.to_dict(),
            "parameters": self.parameters,
            "cost": asdict(self.cost),
            "plain_flops_per_token": self.plain_flops_per_token,
            "work": {name: value and asdict(value) for name, value in work.items()},
            "overheads": [overhead.to_dict() for overhead in self.overheads],
            "reasons": dict(self.reasons),
            "graphs": [asdict(graph) for graph in self.graphs],
        }


@dataclass(frozen=True)
class Operation:
    """One operation of the graph.

    Attributes:
        node: name of its node.
        op: name of the operation: "linear", "add".
        value: shape and dtype of its result, "" if that is no tensor.
        module: path of the innermost module that performs it; "" is the model itself.
        contraction: whether it is a matrix product, a convolution, attention or a recurrence.
        source: `file:line` in the model's code, "" if the tracer did not record it.
    """

    node: str
    op: str
    value: str
    module: str
    contraction: bool
    source: str


@dataclass(frozen=True)
class SiteDetail(SiteReport):
    """A `SiteReport` with the operations of the site.

    Attributes:
        add_operations: the additions of the sum; the last one gives its value.
        code: the line of the model's code, "" if it cannot be read.
        trunk: x, the value that the branch reads.
        trunk_origin: where x comes from.
        skip: the value that the branch is added to: x, or the result of `shortcut`.
        shortcut: operations from x to `skip`, which run on all streams.
        branch_operations: f, in order; empty if the branch begins in another graph.
        axis: the axis of the sum that holds the features.
        axis_origin: how that axis was found.
        declaring_module: path of the module whose pre-hook declares the parameters to the tracer.
        declaring_reason: why it is that module.
        parameters: shapes of its parameters, by path.
        chain: number of its chain in this graph, from 1.
        chain_length: number of sites in that chain.
        previous: path of the previous site of the chain, "" for the first.
        next: path of the next site of the chain, "" for the last.
        lifted: operations between the previous site and this one, which run on all streams.
        init_stream: the stream that the branch prefers at init; None with `init="random"`.
    """

    add_operations: tuple[Operation, ...]
    code: str
    trunk: Operation
    trunk_origin: str
    skip: Operation
    shortcut: tuple[Operation, ...]
    branch_operations: tuple[Operation, ...]
    axis: int
    axis_origin: str
    declaring_module: str
    declaring_reason: str
    parameters: dict[str, tuple[int, ...]]
    chain: int
    chain_length: int
    previous: str
    next: str
    lifted: tuple[Operation, ...]
    init_stream: int | None


@dataclass(frozen=True)
class RejectionDetail(RejectionReport):
    """A `RejectionReport` with the terms of the sum and the documentation of the reason.

    Attributes:
        add_operations: the additions that the verdict is about.
        code: the line of the model's code, "" if it cannot be read.
        terms: the operations whose results are added.
        meaning: what the reason says about an addition.
        example: code for which it is given.
        remedy: how to have such an addition rewritten, or "nothing" and why.
        nearest: the verdict on the nearest other addition of the same module, "" if there is none.
    """

    add_operations: tuple[Operation, ...]
    code: str
    terms: tuple[Operation, ...]
    meaning: str
    example: str
    remedy: str
    nearest: str


@dataclass(frozen=True)
class AddExplanation(Renderable):
    """The verdicts on the additions that a name stands for, printed by rich.

    Attributes:
        node: the name that was given.
        sites: additions that become hyper-connections, in graph order.
        rejections: additions that are skipped, in graph order.
    """

    node: str
    sites: tuple[SiteDetail, ...]
    rejections: tuple[RejectionDetail, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON data."""
        return asdict(self)
