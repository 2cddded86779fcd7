"""Results of `explain` and `why`: verdicts on the additions of a model, and the cost.

A `SiteReport` or a `RejectionReport` is one verdict in short, for `explain`. `SiteDetail` and
`RejectionDetail` are the same verdicts with the operations around the addition, for `why`.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from mhc_compile.errors import OptionError
from mhc_compile.inspection.explain.reach import Reach, reach
from mhc_compile.inspection.roofline import Overhead, overheads
from mhc_compile.reporting.base import Renderable

if TYPE_CHECKING:
    from mhc_compile.config.options import ResolvedOptions
    from mhc_compile.inspection.cost import Cost, Work


@dataclass(frozen=True)
class SiteReport:
    """One residual add that becomes a hyper-connection."""

    path: str  #: of its parameters below the model: "transformer.h.0.mhc.attn"
    owner: str  #: path of the module that performs the add; "" is the model itself
    owner_kind: str  #: class of that module
    branch: str  #: path of the branch below the owner: "attn"
    index: int  #: position in the chain, from 0; at init the branch prefers stream index mod n
    width: int  #: C
    adds: int  #: number of additions in the sum (2 for parallel attention and MLP)
    source: str  #: `file:line` of the add in the model's code, "" if the tracer did not record it


@dataclass(frozen=True)
class ChainReport:
    """Sites that share one set of streams in one graph."""

    sites: tuple[SiteReport, ...]  #: in order
    width: int  #: C
    lifted: tuple[str, ...]  #: names of the trunk operations that run on all streams
    arrives: bool  #: the streams come from another graph, or start as copies of a graph input
    departs: bool  #: the streams may continue in another graph


@dataclass(frozen=True)
class RejectionReport:
    """One addition that is skipped."""

    add: str  #: name of its node in the graph
    module: str  #: path of the module that performs it
    reason: str  #: code of the reason (`mhc_compile.passes.Reason`)
    message: str  #: the finding that led to it
    source: str  #: `file:line` of the add in the model's code, "" if the tracer did not record it


@dataclass(frozen=True)
class GraphReport:
    """One graph that Dynamo made of the model. Equal blocks that share a graph have a report each.

    `regions` are higher-order operations (`cond`, `invoke_subgraph`) whose inner graphs are not
    analyzed; sites under activation checkpointing are among the chains. `tokens` are those of the
    example inputs, as the chains count them (batch × sequence); 0 without a chain, and if chains
    have different numbers of them (an encoder and a decoder).
    """

    module: str  #: path of the module whose method, or a part of it, the graph is; "" is the model
    nodes: int  #: number of nodes
    chains: tuple[ChainReport, ...]  #: chains that are rewritten
    rejections: tuple[RejectionReport, ...]  #: all other additions of two floating-point tensors
    regions: tuple[str, ...]
    tokens: int
    flops: int | None  #: of one forward pass of the plain graph with the example inputs, None if unknown


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
        training: how far a training moves the gates, if one was named (`in_training`).
    """

    model: str
    options: ResolvedOptions
    graphs: tuple[GraphReport, ...]
    cost: Cost
    parameters: int
    plain: Work | None
    added: Work
    floor: Work
    training: Reach | None = None

    def in_training(self, lr: float, steps: int) -> Explanation:
        """Return this explanation with `training` for a peak learning rate and a number of steps.

        It bounds what AdamW can do with the hyper-connections as they start.

        Raises:
            OptionError: `lr` is no positive number, or `steps` is below 1.
        """
        if not 0 < lr < math.inf or steps < 1:
            raise OptionError(f"got lr={lr}, steps={steps}; expected a positive peak learning rate and at least 1 step")
        sites = ((site.width, self.options.at(site.path)) for site in self.sites)
        return replace(self, training=reach(sites, lr, steps))

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
            "training": self.training and self.training.to_dict(),
            "reasons": dict(self.reasons),
            "graphs": [asdict(graph) for graph in self.graphs],
        }


@dataclass(frozen=True)
class Operation:
    """One operation of the graph."""

    node: str  #: name of its node
    op: str  #: name of the operation: "linear", "add"
    value: str  #: shape and dtype of its result, "" if that is no tensor
    module: str  #: path of the innermost module that performs it; "" is the model itself
    contraction: bool  #: whether it is a matrix product, a convolution, attention or a recurrence
    source: str  #: `file:line` in the model's code, "" if the tracer did not record it


@dataclass(frozen=True)
class SiteDetail(SiteReport):
    """A `SiteReport` with the operations of the site."""

    add_operations: tuple[Operation, ...]  #: the additions of the sum; the last one gives its value
    code: str  #: the line of the model's code, "" if it cannot be read
    trunk: Operation  #: x, the value that the branch reads
    trunk_origin: str  #: where x comes from
    skip: Operation  #: the value that the branch is added to: x, or the result of `shortcut`
    shortcut: tuple[Operation, ...]  #: operations from x to `skip`, which run on all streams
    branch_operations: tuple[Operation, ...]  #: f, in order; empty if the branch begins in another graph
    axis: int  #: the axis of the sum that holds the features
    axis_origin: str  #: how that axis was found
    declaring_module: str  #: path of the module whose pre-hook declares the parameters to the tracer
    declaring_reason: str  #: why it is that module
    parameters: dict[str, tuple[int, ...]]  #: shapes of its parameters, by path
    chain: int  #: number of its chain in this graph, from 1
    chain_length: int  #: number of sites in that chain
    previous: str  #: path of the previous site of the chain, "" for the first
    next: str  #: path of the next site of the chain, "" for the last
    lifted: tuple[Operation, ...]  #: operations since the previous site, which run on all streams
    init_stream: int | None  #: the stream that the branch prefers at init; None with `init="random"`


@dataclass(frozen=True)
class RejectionDetail(RejectionReport):
    """A `RejectionReport` with the terms of the sum and the documentation of the reason."""

    add_operations: tuple[Operation, ...]  #: the additions that the verdict is about
    code: str  #: the line of the model's code, "" if it cannot be read
    terms: tuple[Operation, ...]  #: the operations whose results are added
    meaning: str  #: what the reason says about an addition
    example: str  #: code for which it is given
    remedy: str  #: how to have such an addition rewritten, or "nothing" and why
    nearest: str  #: the verdict on the nearest other addition of the same module, "" if there is none


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
