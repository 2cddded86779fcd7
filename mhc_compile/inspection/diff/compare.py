"""`mhc_compile.diff`: runs the passes on what the dry run planned, and compares two of their graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.export import ExportedProgram

from mhc_compile.attachment.model_tree import unwrap
from mhc_compile.capture.shared_graphs import below
from mhc_compile.compilation.dry_run import DryGraph, dry_run
from mhc_compile.compilation.inner_compiler import fuse, fusion_passes, module_like
from mhc_compile.config.options import Options, ResolvedOptions
from mhc_compile.export.exported_program import PREPARE, lowering, plan_program
from mhc_compile.export.program_parameters import ProgramProvenance, root_kind
from mhc_compile.inspection.diff.model_diff import GraphDiff, ModelDiff
from mhc_compile.inspection.diff.rows import align
from mhc_compile.inspection.diff.stages import Stages, choose
from mhc_compile.inspection.explain.explain import graph_report, plan_reports
from mhc_compile.passes import NORMALIZE, expand_plan, run_passes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn
    from torch.fx import Graph

    from mhc_compile.passes import Pass, Plan, Site
    from mhc_compile.passes.planning.split_branches import BranchHead
    from mhc_compile.passes.transforms.stream_builder import Binding

__all__ = ["diff"]


def diff(
    model: nn.Module | ExportedProgram,
    *args: Any,
    options: Mapping[str, Any] | Options | None = None,
    stage: str | None = None,
    **kwargs: Any,
) -> ModelDiff:
    """The graphs of `model` before and after the rewrite. Nothing is run, and the model stays as it is.

    Args:
        model: any module, or one that `torch.compile` returned, or a program from `torch.export.export`.
        *args: example inputs, as for `model(*args, **kwargs)`; none for a program.
        options: as for `torch.compile(model, backend="mhc", options=options)`.
        stage: a stage or a pass ("normalize", "plan", "expand", "lower", "fuse-sites", ...), compared with what comes before it, or two of them
            ("capture..lower"). By default the captured graph is compared with the expanded one.
        **kwargs: example inputs by name.

    Raises:
        OptionError: the options are wrong, or there is no such stage; the message lists those that there are.
        CaptureError: the model cannot be traced with these inputs.
    """
    parsed = Options.parse(options)
    if isinstance(model, ExportedProgram):
        return _program(model, parsed, stage)
    target = unwrap(model)
    names = _names(NORMALIZE, fusion_passes(parsed))
    before, after = choose(stage, names)
    graphs: list[GraphDiff] = []

    def on_graph(dry: DryGraph) -> None:
        stages = _stages(dry, parsed)
        assert stages.names == names
        report = graph_report(dry.captured, dry.session, dry.modules[0])
        graphs.append(GraphDiff(dry.modules, align(*stages.pair(before, after)), report.chains, report.rejections))

    cut = dry_run(target, args, kwargs, parsed, on_graph)
    if cut:
        graphs.clear()
        dry_run(target, args, kwargs, parsed, on_graph, cut)
    return ModelDiff(type(target).__name__, parsed, before, after, tuple(graphs))


def _names(first: tuple[Pass, ...], last: tuple[Pass, ...]) -> tuple[str, ...]:
    """All stages of a model, or of a program, in order."""
    opening = next(place for place, step in enumerate(first) if step.name == "inline-regions") + 1
    opened, rest = [step.name for step in first[:opening]], [step.name for step in first[opening:]]
    expanded = ["expand-streams", "expand", "outline-regions"]
    return ("trace", *opened, "capture", *rest, "normalize", "plan", *expanded, *(step.name for step in last), "lower")


def _stages(dry: DryGraph, options: ResolvedOptions) -> Stages:
    """All stages of one graph that Dynamo made."""
    study, module = dry.session, dry.modules[0]
    stages = Stages(study.provenance, module, study.plan, frozenset(below(module, path) for path in dry.foreseen))
    stages.put("trace", dry.captured.graph)
    _normalize(stages, dry.captured.graph, NORMALIZE)
    graph = _expand(stages, study.graph, study.plan, dry.bindings, dry.openings)
    whole = module_like(dry.captured, graph)
    passes = fusion_passes(options)
    for count, step in enumerate(passes, start=1):
        stages.put(step.name, fuse(whole, passes[:count]).graph)
    stages.alias("lower")
    return stages


def _normalize(stages: Stages, graph: Graph, passes: tuple[Pass, ...]) -> None:
    def see(step: Pass, before: Graph, after: Graph) -> None:
        stages.see(step, before, after)
        if step.name == "inline-regions":
            stages.alias("capture")

    run_passes(graph, passes, see)
    stages.alias("normalize")
    stages.alias("plan")


def _expand(
    stages: Stages,
    graph: Graph,
    plan: Plan,
    bindings: Mapping[Site, Binding],
    openings: Mapping[BranchHead, tuple[str, Binding]] | None = None,
) -> Graph:
    def see(step: Pass, before: Graph, after: Graph) -> None:
        stages.see(step, before, after)
        if step.name == "expand-streams":
            stages.alias("expand")

    return expand_plan(graph, plan, bindings, see, openings=openings)


def _program(program: ExportedProgram, options: ResolvedOptions, stage: str | None) -> ModelDiff:
    passes = lowering(program)
    before, after = choose(stage, _names(PREPARE, passes))
    found = plan_program(program, options)
    graph, parameters, plan, bindings = found.graph, found.parameters, found.plan, found.bind()
    inputs = parameters.specs
    stages = Stages(ProgramProvenance(graph, inputs), "", plan, frozenset(parameters.tensors))
    stages.put("trace", program.graph)
    _normalize(stages, program.graph, PREPARE)
    run_passes(_expand(stages, graph, plan, bindings), passes, stages.see)
    stages.alias("lower")
    graphs = [GraphDiff(("",), align(*stages.pair(before, after)), *plan_reports(plan, ""))]
    return ModelDiff(root_kind(program), options, before, after, tuple(graphs))
