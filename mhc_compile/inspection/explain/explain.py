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
    from collections.abc import Callable, Mapping

    from torch import nn
    from torch.fx import Graph, GraphModule

    from mhc_compile.passes import Plan, Rejection, Site
    from mhc_compile.passes.analysis.provenance import Provenance

    Modules = tuple[str, ...]


def explain(
    model: nn.Module | ExportedProgram, *args: Any, options: Mapping[str, Any] | Options | None = None, **kwargs: Any
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
    graphs: list[GraphReport] = []
    costs: dict[str, list[Cost]] = {}
    plain, added, floor = Work(), Work(), Work()

    def on_graph(captured: GraphModule, graph: Graph, plan: Plan, provenance: Provenance, modules: Modules) -> None:
        nonlocal plain, added, floor
        moved = traffic(graph, provenance.holds_weights)
        for module in modules:
            report = _graph_report(captured, graph, plan, module)
            graphs.append(report)
            plain += moved + Work(report.flops or 0)
            for site in plan.sites:
                value = tensor_value(site.add)
                assert value is not None
                path = below(module, site.path)
                own = parsed.at(path)
                costs.setdefault(path, []).append(site_cost(site.width, value.element_size(), own))
                lowered, least = site_work(site, own)
                added, floor = added + lowered, floor + least
            for chain in plan.chains:
                if not chain.departures:
                    end = below(module, f"{chain.sites[-1].path}.read_out")
                    costs.setdefault(end, []).append(end_cost(chain.width, parsed))

    target = plan_graphs(model, args, kwargs, parsed, on_graph)
    return Explanation(
        model=root_kind(target) if isinstance(target, ExportedProgram) else type(target).__name__,
        options=parsed,
        graphs=tuple(graphs),
        # A layer that runs twice pays twice and has one set of parameters.
        cost=sum((calls[0].times(len(calls)) for calls in costs.values()), Cost()),
        parameters=sum(p.numel() for path, p in target.named_parameters() if ".mhc." not in f".{path}"),
        plain=plain if all(graph.flops is not None for graph in graphs) else None,
        added=added,
        floor=floor,
    )


def plan_graphs(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: ResolvedOptions,
    on_graph: Callable[[GraphModule, Graph, Plan, Provenance, Modules], None],
) -> nn.Module | ExportedProgram:
    """Call `on_graph` with every graph of a model or a program, and return it unwrapped.

    Its arguments: the captured graph, the normalized one, the plan, and the paths of the modules
    that run the graph.
    """
    if isinstance(model, ExportedProgram):
        found = plan_program(model, options)
        provenance = ProgramProvenance(found.graph, model.graph_signature.input_specs)
        on_graph(model.graph_module, found.graph, found.plan, provenance, ("",))
        return model
    target = unwrap(model)

    def on_dry_graph(dry: DryGraph) -> None:
        session = dry.session
        on_graph(session.captured, session.graph, session.plan, session.provenance, dry.modules)

    dry_run(target, args, kwargs, options, on_dry_graph)
    return target


def _graph_report(captured: GraphModule, graph: Graph, plan: Plan, module: str) -> GraphReport:
    """Return the report on a captured graph, as the module with the path `module` runs it."""
    chains, rejections = plan_reports(plan, module)
    values = [(tensor_value(chain.start), chain.width) for chain in plan.chains]
    tokens = {_torch.example_size(value.numel()) // width for value, width in values if value is not None}
    return GraphReport(
        module=module,
        nodes=len(captured.graph.nodes),
        chains=chains,
        rejections=rejections,
        regions=tuple(op_name(node) for node in graph.nodes if is_region(node)),
        tokens=tokens.pop() if len(tokens) == 1 else 0,
        flops=plain_flops(captured),
    )


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
