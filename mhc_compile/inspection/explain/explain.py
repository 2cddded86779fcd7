"""`mhc_compile.explain`: the dry run, as data. `report` renders it; the rewrite reads the same plan."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch.export import ExportedProgram

from mhc_compile import _torch
from mhc_compile.attachment.sites import unwrap
from mhc_compile.capture.shared_graphs import below
from mhc_compile.compilation.dry_run import DryGraph, dry_run
from mhc_compile.config.options import Options, ResolvedOptions
from mhc_compile.export.exported_program import plan_program
from mhc_compile.export.program_parameters import ProgramProvenance, root_kind
from mhc_compile.inspection.cost import Cost, end_cost, plain_flops, site_cost
from mhc_compile.inspection.roofline import Overhead, Work, overheads, site_work, traffic
from mhc_compile.passes.analysis.op_info import is_region, op_name, tensor_value
from mhc_compile.passes.analysis.provenance import source_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from rich.console import RenderableType
    from torch import nn
    from torch.fx import Graph

    from mhc_compile.compilation.session import Study
    from mhc_compile.passes import Chain, Plan, Rejection, Site

__all__ = [
    "ChainReport",
    "Explanation",
    "GraphReport",
    "RejectionReport",
    "SiteReport",
    "explain",
    "graph_report",
    "plan_reports",
]


@dataclass(frozen=True)
class SiteReport:
    """One residual add that will become a hyper-connection.

    Attributes:
        path: where its parameters are, below the model: "transformer.h.0.mhc.attn".
        owner: path of the module that performs the add; "" is the model itself.
        owner_kind: class of that module.
        branch: the branch below the owner: "attn".
        index: position in the chain, which also says which stream the branch leans to (index mod n).
        width: C.
        adds: how many additions it is made of (2 for parallel attention and MLP).
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
    """Sites that share one set of streams in one graph; `lifted` are the trunk operations that run on all streams.

    Streams that arrive come from another graph of the model, or start as copies of a graph input; streams that depart may go on in another graph.
    """

    sites: tuple[SiteReport, ...]
    width: int
    lifted: tuple[str, ...]
    arrives: bool
    departs: bool


@dataclass(frozen=True)
class RejectionReport:
    """One addition that stays as it is: the graph's name for it, the module, the reason's code, the story, and `file:line`."""

    add: str
    module: str
    reason: str
    message: str
    source: str


@dataclass(frozen=True)
class GraphReport:
    """One graph that Dynamo made of the model, as one module runs it: blocks that look the same share a graph, and each has a report.

    Attributes:
        module: path of the module whose method the graph is, or a part of it; "" is the model itself.
        nodes: its size.
        chains: what will be rewritten.
        rejections: every other addition of two floating-point tensors.
        regions: higher-order operations (`cond`, `invoke_subgraph`) whose inner graphs are not looked into. Sites under activation checkpointing are
            among the chains.
        tokens: tokens in the example inputs, as the chains count them (batch × sequence); 0 without a chain, and where chains have different
            numbers of them (an encoder and a decoder).
        flops: of one forward pass of the plain graph with the example inputs, None if they could not be counted.
    """

    module: str
    nodes: int
    chains: tuple[ChainReport, ...]
    rejections: tuple[RejectionReport, ...]
    regions: tuple[str, ...]
    tokens: int
    flops: int | None


@dataclass(frozen=True)
class Explanation:
    """What `backend="mhc"` would do to a model. Print it with rich, or read the fields.

    Attributes:
        model: class name.
        options: the options it was made for.
        graphs: one report per graph, and per block where blocks share one; a graph break gives several.
        cost: what the sites add, per token and forward pass, all graphs together.
        parameters: parameters of the plain model.
        plain: what one forward pass of the plain model does with the example inputs; None if its FLOPs could not be counted.
        added: what the sites do beyond their plain adds in such a pass, as they are lowered now.
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
        """All chains."""
        return tuple(chain for graph in self.graphs for chain in graph.chains)

    @property
    def sites(self) -> tuple[SiteReport, ...]:
        """All sites."""
        return tuple(site for chain in self.chains for site in chain.sites)

    @property
    def rejections(self) -> tuple[RejectionReport, ...]:
        """All additions that stay as they are."""
        return tuple(rejection for graph in self.graphs for rejection in graph.rejections)

    @property
    def regions(self) -> Counter[str]:
        """Higher-order operations that were not looked into, by name."""
        return Counter(region for graph in self.graphs for region in graph.regions)

    @property
    def reasons(self) -> Counter[str]:
        """How often each reason was given."""
        return Counter(rejection.reason for rejection in self.rejections)

    @property
    def plain_flops_per_token(self) -> float | None:
        """Forward FLOPs of the plain model per token; None if they could not be counted, or if chains of a graph have different numbers of tokens."""
        counted = [graph for graph in self.graphs if graph.chains]
        if not counted or any(graph.flops is None or not graph.tokens for graph in counted):
            return None
        return sum(graph.flops / graph.tokens for graph in counted if graph.flops is not None)

    @property
    def overheads(self) -> tuple[Overhead, ...]:
        """The expected overhead of a step on known machines: a roofline estimate (see `mhc_compile.inspection.roofline`). Empty if it cannot be made."""
        return overheads(self.plain, self.added, self.floor) if self.plain is not None and self.sites else ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the fields, and `reasons`, `plain_flops_per_token` and `overheads` beside them."""
        return {
            "model": self.model,
            "options": self.options.to_dict(),
            "parameters": self.parameters,
            "cost": asdict(self.cost),
            "plain_flops_per_token": self.plain_flops_per_token,
            "work": {name: work and asdict(work) for name, work in self._work.items()},
            "overheads": [_overhead(overhead) for overhead in self.overheads],
            "reasons": dict(self.reasons),
            "graphs": [asdict(graph) for graph in self.graphs],
        }

    @property
    def _work(self) -> dict[str, Work | None]:
        return {"plain": self.plain, "added": self.added, "floor": self.floor}

    def __rich__(self) -> RenderableType:
        from mhc_compile.inspection.explain.report import render

        return render(self)

    def _repr_html_(self) -> str:
        from mhc_compile.reporting.html import html_of

        return html_of(self)


def explain(
    model: nn.Module | ExportedProgram,
    *args: Any,
    options: Mapping[str, Any] | Options | None = None,
    **kwargs: Any,
) -> Explanation:
    """Says what would be rewritten in `model`, what not and why, and what it costs. Nothing is run and nothing is changed.

    Args:
        model: any module, or one that `torch.compile` returned, or an exported program.
        *args: example inputs, as for `model(*args, **kwargs)`. A program has its own, and needs none.
        options: as for `torch.compile(model, backend="mhc", options=options)`.
        **kwargs: example inputs by name.

    Raises:
        OptionError: the options are wrong.
        CaptureError: the model cannot be traced with these inputs, or the program is a joint graph of forward and backward.
    """
    parsed = Options.parse(options)
    if isinstance(model, ExportedProgram):
        return _explain_program(model, parsed)
    target = unwrap(model)
    tally = _Tally(parsed)

    def on_graph(dry: DryGraph) -> None:
        provenance = dry.study.provenance
        moved = traffic(dry.study.graph, provenance.holds_weights)
        for module in dry.modules:
            tally.add(graph_report(dry.captured, dry.study, module), dry.study.plan, moved)

    dry_run(target, args, kwargs, parsed, on_graph)
    return tally.explanation(type(target).__name__, dict(target.named_parameters()))


def _explain_program(program: ExportedProgram, options: ResolvedOptions) -> Explanation:
    graph, _, plan = plan_program(program, options)
    tally = _Tally(options)
    provenance = ProgramProvenance(graph, program.graph_signature.input_specs)
    tally.add(_graph_report(program.graph_module, graph, plan, ""), plan, traffic(graph, provenance.holds_weights))
    return tally.explanation(root_kind(program), dict(program.named_parameters()))


class _Tally:
    """Adds up what the graphs of a model say."""

    def __init__(self, options: ResolvedOptions) -> None:
        self.options = options
        self.graphs: list[GraphReport] = []
        self.costs: dict[str, list[Cost]] = {}
        self.counted = True
        self.plain, self.added, self.floor = Work(), Work(), Work()

    def add(self, report: GraphReport, plan: Plan, moved: Work) -> None:
        """One graph, as one module runs it."""
        self.graphs.append(report)
        self.counted &= report.flops is not None
        self.plain += moved + Work(report.flops or 0)
        for site in plan.sites:
            value = tensor_value(site.add)
            assert value is not None
            path = below(report.module, site.path)
            options = self.options.at(path)
            self.costs.setdefault(path, []).append(site_cost(site.width, value.element_size(), options))
            added, floor = site_work(site, options)
            self.added += added
            self.floor += floor
        for chain in plan.chains:
            if not chain.departures:
                end = below(report.module, f"{chain.sites[-1].path}.read_out")
                self.costs.setdefault(end, []).append(end_cost(chain.width, self.options))

    def explanation(self, name: str, parameters: Mapping[str, torch.Tensor]) -> Explanation:
        """The sums."""
        # A site that is met twice (a shared layer) pays twice and has one set of parameters.
        total = sum((met[0].times(len(met)) for met in self.costs.values()), Cost())
        own = sum(p.numel() for path, p in parameters.items() if ".mhc." not in f".{path}")
        plain = self.plain if self.counted else None
        return Explanation(name, self.options, tuple(self.graphs), total, own, plain, self.added, self.floor)


def graph_report(graph_module: torch.fx.GraphModule, result: Study, module: str) -> GraphReport:
    """What explain says about one graph, as `module` runs it."""
    return _graph_report(graph_module, result.graph, result.plan, module)


def _graph_report(graph_module: torch.fx.GraphModule, graph: Graph, plan: Plan, module: str) -> GraphReport:
    chains, rejections = plan_reports(plan, module)
    tokens = {_tokens(chain) for chain in plan.chains}
    return GraphReport(
        module=module,
        nodes=len(graph_module.graph.nodes),
        chains=chains,
        rejections=rejections,
        regions=tuple(op_name(node) for node in graph.nodes if is_region(node)),
        tokens=tokens.pop() if len(tokens) == 1 else 0,
        flops=plain_flops(graph_module),
    )


def _tokens(chain: Chain) -> int:
    value = tensor_value(chain.start)
    assert value is not None
    return _torch.example_size(value.numel()) // chain.width


def plan_reports(plan: Plan, module: str) -> tuple[tuple[ChainReport, ...], tuple[RejectionReport, ...]]:
    """What a plan rewrites and what it leaves alone, with paths below the model; `module` is the path of the graph's root."""
    chains = tuple(_chain(chain, module) for chain in plan.chains)
    return chains, tuple(_rejection(rejection, module) for rejection in plan.rejections)


def _overhead(overhead: Overhead) -> dict[str, Any]:
    """Without the machines of which no time can be told: infinity is no JSON."""
    machine = {name: value for name, value in asdict(overhead.machine).items() if value != float("inf")}
    return {**asdict(overhead), "machine": machine}


def _chain(chain: Chain, module: str) -> ChainReport:
    return ChainReport(
        sites=tuple(_site(site, index, module) for index, site in enumerate(chain.sites)),
        width=chain.width,
        lifted=tuple(op_name(node) for region in chain.links for node in region.nodes),
        arrives=chain.arrives,
        departs=bool(chain.departures),
    )


def _site(site: Site, index: int, module: str) -> SiteReport:
    return SiteReport(
        path=below(module, site.path),
        owner=below(module, site.owner.path),
        owner_kind=site.owner.kind,
        branch=site.name,
        index=index,
        width=site.width,
        adds=len(site.adds),
        source=source_line(site.add),
    )


def _rejection(rejection: Rejection, module: str) -> RejectionReport:
    return RejectionReport(
        add=rejection.add.name,
        module=below(module, rejection.module_path),
        reason=rejection.reason.value,
        message=rejection.message,
        source=source_line(rejection.add),
    )
