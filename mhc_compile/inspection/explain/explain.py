"""`mhc_compile.explain`: the plan of the rewrite as data, from the same analysis as the rewrite."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.export import ExportedProgram

from mhc_compile import _torch
from mhc_compile.attachment.model_tree import unwrap
from mhc_compile.capture.shared_graphs import below
from mhc_compile.compilation.dry_run import DryGraph, dry_run
from mhc_compile.config.options import Options, ResolvedOptions
from mhc_compile.export.exported_program import plan_program
from mhc_compile.export.program_parameters import ProgramProvenance, root_kind
from mhc_compile.inspection.cost import Cost, Work, end_cost, site_cost, site_work
from mhc_compile.inspection.explain.results import ChainReport, Explanation, GraphReport, RejectionReport, SiteReport
from mhc_compile.inspection.roofline import plain_flops, traffic
from mhc_compile.passes.analysis.op_info import is_region, op_name, tensor_value
from mhc_compile.passes.analysis.provenance import source_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn
    from torch.fx import Graph, GraphModule

    from mhc_compile.compilation.session import GraphSession
    from mhc_compile.passes import Chain, Plan, Rejection, Site

__all__ = ["explain", "graph_report", "plan_reports", "rejection_report", "site_report"]


def explain(
    model: nn.Module | ExportedProgram,
    *args: Any,
    options: Mapping[str, Any] | Options | None = None,
    **kwargs: Any,
) -> Explanation:
    """Explain which additions of `model` are rewritten, which are skipped and why, and the cost.

    The model is traced, not run, and not changed.

    Args:
        model: any module, also one that `torch.compile` returned, or an exported program.
        *args: example inputs, as for `model(*args, **kwargs)`; none for a program.
        options: as for `torch.compile(model, backend="mhc", options=options)`.
        **kwargs: example inputs by name.

    Raises:
        OptionError: the options are wrong.
        CaptureError: the model cannot be traced with these inputs, or the program is a joint graph
            of forward and backward.
    """
    parsed = Options.parse(options)
    totals = _Totals(parsed)
    if isinstance(model, ExportedProgram):
        found = plan_program(model, parsed)
        graph, plan = found.graph, found.plan
        provenance = ProgramProvenance(graph, model.graph_signature.input_specs)
        report = _graph_report(model.graph_module, graph, plan, "")
        totals.add(report, plan, traffic(graph, provenance.holds_weights))
        return totals.explanation(root_kind(model), dict(model.named_parameters()))
    target = unwrap(model)

    def on_graph(dry: DryGraph) -> None:
        session = dry.session
        moved = traffic(session.graph, session.provenance.holds_weights)
        for module in dry.modules:
            totals.add(graph_report(dry.captured, session, module), session.plan, moved)

    dry_run(target, args, kwargs, parsed, on_graph)
    return totals.explanation(type(target).__name__, dict(target.named_parameters()))


class _Totals:
    """Sums over the graphs of a model."""

    def __init__(self, options: ResolvedOptions) -> None:
        self.options = options
        self.graphs: list[GraphReport] = []
        self.costs: dict[str, list[Cost]] = {}
        self.plain, self.added, self.floor = Work(), Work(), Work()

    def add(self, report: GraphReport, plan: Plan, moved: Work) -> None:
        """Add one graph, as one module runs it. `moved` is the traffic of the plain graph."""
        self.graphs.append(report)
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
        """Return the sums for the model `name` with all its `parameters`."""
        # A layer that runs twice pays twice and has one set of parameters.
        total = sum((calls[0].times(len(calls)) for calls in self.costs.values()), Cost())
        own = sum(p.numel() for path, p in parameters.items() if ".mhc." not in f".{path}")
        known = all(graph.flops is not None for graph in self.graphs)
        return Explanation(
            model=name,
            options=self.options,
            graphs=tuple(self.graphs),
            cost=total,
            parameters=own,
            plain=self.plain if known else None,
            added=self.added,
            floor=self.floor,
        )


def graph_report(captured: GraphModule, session: GraphSession, module: str) -> GraphReport:
    """Return the report on a captured graph, as the module with the path `module` runs it."""
    return _graph_report(captured, session.graph, session.plan, module)


def _graph_report(captured: GraphModule, graph: Graph, plan: Plan, module: str) -> GraphReport:
    chains, rejections = plan_reports(plan, module)
    tokens = {_tokens(chain) for chain in plan.chains}
    return GraphReport(
        module=module,
        nodes=len(captured.graph.nodes),
        chains=chains,
        rejections=rejections,
        regions=tuple(op_name(node) for node in graph.nodes if is_region(node)),
        tokens=tokens.pop() if len(tokens) == 1 else 0,
        flops=plain_flops(captured),
    )


def _tokens(chain: Chain) -> int:
    value = tensor_value(chain.start)
    assert value is not None
    return _torch.example_size(value.numel()) // chain.width


def plan_reports(plan: Plan, module: str) -> tuple[tuple[ChainReport, ...], tuple[RejectionReport, ...]]:
    """Return the chains and the rejections of a plan. `module` is the path of the graph's root."""
    chains = (
        ChainReport(
            sites=tuple(site_report(site, index, module) for index, site in enumerate(chain.sites)),
            width=chain.width,
            lifted=tuple(op_name(node) for region in chain.links for node in region.nodes),
            arrives=chain.arrives,
            departs=bool(chain.departures),
        )
        for chain in plan.chains
    )
    return tuple(chains), tuple(rejection_report(rejection, module) for rejection in plan.rejections)


def site_report(site: Site, index: int, module: str) -> SiteReport:
    """Return the report on the site at position `index` of its chain."""
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


def rejection_report(rejection: Rejection, module: str) -> RejectionReport:
    """Return the report on an addition that is skipped."""
    return RejectionReport(
        add=rejection.add.name,
        module=below(module, rejection.module_path),
        reason=rejection.reason.value,
        message=rejection.message,
        source=source_line(rejection.add),
    )
