"""`mhc_compile.diff`: run the passes on the graphs of a dry run, and compare two of their stages.

| stage | graph |
| --- | --- |
| trace | from Dynamo or `torch.export` |
| capture | with the regions of activation checkpointing inlined |
| normalize | in the spelling in which sites are searched |
| plan | the same, with a verdict on every add |
| expand | on streams |
| lower | for the inner compiler: sites fused; of an exported program, in plain ATen |

Every pass is a stage as well, by its name.
"""

from __future__ import annotations

import difflib
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch.export import ExportedProgram

from mhc_compile.attachment.model_tree import unwrap
from mhc_compile.capture.shared_graphs import below
from mhc_compile.compilation.dry_run import DryGraph, dry_run
from mhc_compile.compilation.inner_compiler import fuse, fusion_passes, module_like
from mhc_compile.config.options import Options, ResolvedOptions
from mhc_compile.errors import OptionError
from mhc_compile.export.exported_program import PREPARE, lowering, plan_program
from mhc_compile.export.program_parameters import ProgramProvenance, root_kind
from mhc_compile.inspection.diff.results import Change, GraphDiff, ModelDiff, Row
from mhc_compile.inspection.diff.views import Viewer
from mhc_compile.inspection.explain.explain import plan_reports
from mhc_compile.passes import NORMALIZE, expand_plan, run_passes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import nn
    from torch.fx import Graph

    from mhc_compile.inspection.diff.results import NodeView
    from mhc_compile.passes import Pass, Plan
    from mhc_compile.passes.analysis.provenance import Provenance

#: The stages that are no pass, in order.
_STAGES = ("trace", "capture", "normalize", "plan", "expand", "lower")
_DEFAULT = ("capture", "expand")
#: The pass after which the graph has a second name.
_ALIASES = {"inline-regions": "capture", "expand-streams": "expand"}
#: Python's in-place operators, by what they compute.
_IN_PLACE = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "truediv"}


def diff(
    model: nn.Module | ExportedProgram,
    *args: Any,
    options: Mapping[str, Any] | Options | None = None,
    stage: str | None = None,
    **kwargs: Any,
) -> ModelDiff:
    """Compare the graphs of `model` before and after the rewrite, without running or changing it.

    Args:
        model: any module, or one that `torch.compile` returned, or a program from
            `torch.export.export`.
        *args: example inputs, as for `model(*args, **kwargs)`; none for a program.
        options: as for `torch.compile(model, backend="mhc", options=options)`.
        stage: a stage or a pass ("normalize", "plan", "expand", "lower", "fuse-sites", ...) to be
            compared with its predecessor, or two of them. Default: "capture..expand".
        **kwargs: example inputs by name.

    Raises:
        OptionError: the options are wrong, or there is no such stage; the message lists all.
        CaptureError: the model cannot be traced with these inputs.
    """
    parsed = Options.parse(options)
    if isinstance(model, ExportedProgram):
        return _program(model, parsed, stage)
    target = unwrap(model)
    names = _names(NORMALIZE, fusion_passes(parsed))
    before, after = _choose(stage, names)
    graphs: list[GraphDiff] = []

    def on_graph(dry: DryGraph) -> None:
        stages = _stages(dry, parsed)
        assert stages.names == names
        reports = plan_reports(dry.session.plan, dry.modules[0])
        graphs.append(GraphDiff(dry.modules, align(*stages.pair(before, after)), *reports))

    cut = dry_run(target, args, kwargs, parsed, on_graph)
    if cut:
        graphs.clear()
        dry_run(target, args, kwargs, parsed, on_graph, cut)
    return ModelDiff(type(target).__name__, parsed, before, after, tuple(graphs))


def _program(program: ExportedProgram, options: ResolvedOptions, stage: str | None) -> ModelDiff:
    passes = lowering(program)
    before, after = _choose(stage, _names(PREPARE, passes))
    found = plan_program(program, options)
    graph, plan, bindings, parameters = found.graph, found.plan, found.bind(), found.parameters
    stages = _Stages(ProgramProvenance(graph, parameters.specs), "", plan, frozenset(parameters.tensors))
    stages.normalize(program.graph, PREPARE)
    run_passes(expand_plan(graph, plan, bindings, stages.see), passes, stages.see)
    stages.alias("lower")
    compared = GraphDiff(("",), align(*stages.pair(before, after)), *plan_reports(plan, ""))
    return ModelDiff(root_kind(program), options, before, after, (compared,))


def _stages(dry: DryGraph, options: ResolvedOptions) -> _Stages:
    """Return all stages of one graph that Dynamo captured."""
    study, module = dry.session, dry.modules[0]
    foreseen = frozenset(below(module, path) for path in dry.foreseen)
    stages = _Stages(study.provenance, module, study.plan, foreseen)
    stages.normalize(dry.session.captured.graph, NORMALIZE)
    expanded = expand_plan(study.graph, study.plan, dry.bindings, stages.see, openings=dry.openings)
    whole = module_like(dry.session.captured, expanded)
    passes = fusion_passes(options)
    for count, step in enumerate(passes, start=1):
        stages.put(step.name, fuse(whole, passes[:count]).graph)
    stages.alias("lower")
    return stages


@dataclass
class _Stages:
    """The graphs of one run of the passes, in order; `see` is a hook of `run_passes`.

    `prefix` is the path of the module that the graph belongs to, `foreseen` are names of parameters
    that become graph inputs when the graph is expanded.
    """

    provenance: Provenance
    prefix: str
    plan: Plan
    foreseen: frozenset[str]
    _graphs: dict[str, tuple[NodeView, ...]] = field(default_factory=dict)

    def normalize(self, graph: Graph, passes: tuple[Pass, ...]) -> None:
        """Record the stages from "trace" to "plan"."""
        self.put("trace", graph)
        run_passes(graph, passes, self.see)
        self.alias("normalize")
        self.alias("plan")

    def put(self, name: str, graph: Graph) -> None:
        """Record `graph` under the name of a stage."""
        nodes = tuple(Viewer(self.provenance, self.plan, self.prefix).graph(graph))
        if "expand-streams" not in (name, *self._graphs):
            nodes = tuple(node for node in nodes if node.op != "parameter" or node.name not in self.foreseen)
        self._graphs[name] = nodes
        if name in _ALIASES:
            self.alias(_ALIASES[name])

    def see(self, step: Pass, before: Graph, after: Graph) -> None:  # noqa: ARG002 - a hook
        """Record the result of `step`."""
        self.put(step.name, after)

    def alias(self, name: str) -> None:
        """Give the latest stage a second name."""
        self._graphs[name] = self._graphs[self.names[-1]]

    @property
    def names(self) -> tuple[str, ...]:
        """The stages, in the order in which they were recorded."""
        return tuple(self._graphs)

    def pair(self, before: str, after: str) -> tuple[tuple[NodeView, ...], tuple[NodeView, ...]]:
        """Return two stages. Verdicts appear with the plan, and are new if the diff ends there."""
        earlier, later, order = self._graphs[before], self._graphs[after], self.names.index
        if order(after) < order("plan"):
            later = _without_verdicts(later)
        if order(after) <= order("plan"):
            earlier = _without_verdicts(earlier)
        elif order(before) < order("plan"):
            earlier = _with_verdicts(earlier, self._graphs["plan"])
        return earlier, later


def _names(first: tuple[Pass, ...], last: tuple[Pass, ...]) -> tuple[str, ...]:
    """Return all stages of a model, or of a program, in order."""
    names = (*(step.name for step in first), "normalize", "plan", "expand-streams", "outline-regions")
    aliased = [other for name in names for other in (name, _ALIASES.get(name)) if other]
    return ("trace", *aliased, *(step.name for step in last), "lower")


def _without_verdicts(nodes: tuple[NodeView, ...]) -> tuple[NodeView, ...]:
    return tuple(replace(node, role="", site="", reason="") if node.role != "stream" else node for node in nodes)


def _with_verdicts(nodes: tuple[NodeView, ...], plan: tuple[NodeView, ...]) -> tuple[NodeView, ...]:
    """Return the nodes of an earlier stage with the verdicts on their counterparts in the plan."""
    twins = {row.before.name: row.after for row in align(nodes, plan) if row.before and row.after}

    def judged(node: NodeView) -> NodeView:
        twin = twins.get(node.name, node)
        return replace(node, role=twin.role, site=twin.site, reason=twin.reason) if not node.role else node

    return tuple(map(judged, nodes))


def _choose(stage: str | None, known: tuple[str, ...]) -> tuple[str, str]:
    """Return the two stages that a diff compares; `known` are all, in order."""
    if stage is None:
        return _DEFAULT
    before, dots, after = stage.partition("..")
    names = [before, after] if dots else [stage]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise OptionError(
                f"stage {name!r} is unknown; {hint}known stages: {', '.join(known)}; two of them as capture..lower"
            )
    if not dots:
        order = _STAGES if stage in _STAGES else known
        before, after = order[max(0, order.index(stage) - 1)], stage
        if stage == "lower" and "outline-regions" in known:  # like its own graph, with regions outlined
            before = "outline-regions"
    if known.index(before) > known.index(after):
        raise OptionError(f"stage {before!r} does not come before {after!r}; the order is: {', '.join(known)}")
    return before, after


def align(before: Sequence[NodeView], after: Sequence[NodeView]) -> tuple[Row, ...]:
    """Return the rows of two graphs, in their order. A moved pair appears as removed and added."""
    pairs = _ordered(_pairs(before, after))
    rows: list[Row] = []
    i = j = 0
    for left, right in [*pairs, (len(before), len(after))]:
        rows += [Row(Change.REMOVED, node, None) for node in before[i:left]]
        rows += [Row(Change.ADDED, None, node) for node in after[j:right]]
        if left < len(before):
            rows.append(Row(_change(before[left], after[right]), before[left], after[right]))
        i, j = left + 1, right + 1
    return tuple(rows)


def _pairs(before: Sequence[NodeView], after: Sequence[NodeView]) -> list[tuple[int, int]]:
    """Pair nodes by name and operation, adds with the update of their site, lifted operations."""
    places = {node.name: place for place, node in enumerate(after)}
    pairs: dict[int, int] = {}
    for place, node in enumerate(before):
        other = places.get(node.name)
        if other is not None and after[other].target == node.target and after[other].op == node.op:
            pairs[place] = other
    free = set(range(len(after))) - set(pairs.values())
    updates = {after[place].site: place for place in sorted(free) if after[place].target.startswith("mhc.update")}
    lifted: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for place in sorted(free - set(updates.values())):
        if after[place].role == "" or not after[place].target.startswith("mhc."):
            lifted[_trace(after[place])].append(place)
    last_adds = {node.site: place for place, node in enumerate(before) if node.role == "site"}
    for place, node in enumerate(before):
        if place in pairs or node.op != "call":
            continue
        if node.role == "site" and node.site in updates and last_adds[node.site] == place:
            pairs[place] = updates.pop(node.site)
        elif lifted[_trace(node)]:
            pairs[place] = lifted[_trace(node)].pop(0)
    return sorted(pairs.items())


def _trace(node: NodeView) -> tuple[str, str, str]:
    name = node.target.rpartition(".")[2].rstrip("_")
    return node.module, node.source, _IN_PLACE.get(name, name)


def _ordered(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the longest selection in order on both sides. `pairs` is sorted by the left."""
    tails: list[int] = []
    ends: list[int] = []
    previous: list[int] = []
    for index, (_, right) in enumerate(pairs):
        length = bisect_left(tails, right)
        previous.append(ends[length - 1] if length else -1)
        tails[length : length + 1] = [right]
        ends[length : length + 1] = [index]
    chosen, index = [], ends[-1] if ends else -1
    while index >= 0:
        chosen.append(pairs[index])
        index = previous[index]
    return chosen[::-1]


def _change(before: NodeView, after: NodeView) -> Change:
    if before.target.rpartition(".")[2] != after.target.rpartition(".")[2]:
        return Change.REPLACED
    if before.value != after.value and before.role != "stream":
        return Change.LIFTED
    if (before.template, before.reads, before.value) != (after.template, after.reads, after.value):
        return Change.REWIRED
    verdicts = [(node.role, node.site, node.reason) for node in (before, after)]
    return Change.SAME if verdicts[0] == verdicts[1] else Change.MARKED
