"""One Dynamo graph on its way from capture to the graph that the inner compiler gets.

    GraphSession.analyze   read the frame, normalise the graph, find and plan its sites
    GraphSession.attach    give the sites their parameters; the trace starts again if any were missing
    GraphSession.rewrite   bind the parameters, put the graph on streams

`explain`, `diff` and `attach` stop at the plan; the backend goes on to the end.
"""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from mhc_compile import _torch
from mhc_compile.attachment.averaged_model import follow_averages
from mhc_compile.attachment.model_tree import connections, find_connection
from mhc_compile.attachment.optimizers import settle
from mhc_compile.attachment.sites import attach_like, attach_site
from mhc_compile.capture.equivalent_blocks import EquivalentBlocks, equivalent_blocks
from mhc_compile.capture.frame import read_frame
from mhc_compile.capture.provenance import DynamoProvenance
from mhc_compile.compilation.bindings import PlannedSite, planned_sites
from mhc_compile.compilation.boundary_analysis import analyze_boundary, check_whole
from mhc_compile.compilation.messages import warn_nothing_rewritten, warn_split_branch, warn_unused
from mhc_compile.compilation.module_parameters import ModuleParameters
from mhc_compile.distributed.guards import check_site, ddp_parameters, warn_of_pipeline
from mhc_compile.errors import warn
from mhc_compile.graph_breaks.split_branches import Notes
from mhc_compile.passes import Reason, close_regions, expand_plan, normalize
from mhc_compile.passes.analysis.op_info import is_contraction
from mhc_compile.passes.planning.graph_boundary import BoundaryInfo
from mhc_compile.passes.planning.planner import Planner

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn
    from torch.fx import Graph

    from mhc_compile.config.options import ResolvedOptions
    from mhc_compile.passes import Plan
    from mhc_compile.passes.transforms.stream_builder import Binding

__all__ = ["GraphSession", "analyze_graph"]

log = logging.getLogger(__name__)


@dataclass(eq=False)
class GraphSession:
    """A normalised graph, the plan for it, and the modules it comes from.

    Valid while Dynamo traces the frame.
    """

    captured: torch.fx.GraphModule
    graph: Graph
    provenance: DynamoProvenance
    options: ResolvedOptions
    planner: Planner

    @classmethod
    def analyze(cls, graph_module: torch.fx.GraphModule, inputs: list[Any], options: ResolvedOptions) -> GraphSession:
        """Normalise the graph that Dynamo handed over, find its sites and plan its chains.

        The graph itself stays as it is.
        """
        graph = normalize(graph_module.graph)
        provenance = DynamoProvenance(graph, inputs, read_frame())
        boundary = analyze_boundary(graph, provenance, inputs)
        planner = Planner(graph, provenance, options.min_chain_length, boundary)
        if options.read_out != "mean" or options.single_pass:
            check_whole(planner.plan, boundary, options, provenance)
            # A value that happens to be a result of the graph ends its chain as any other reader
            # does.
            boundary = BoundaryInfo(tail=boundary.tail, attached=boundary.attached)
            planner = Planner(graph, provenance, options.min_chain_length, boundary)
        session = cls(graph_module, graph, provenance, options, planner)
        session._check_overrides()
        return session

    @property
    def plan(self) -> Plan:
        """The plan as it stands."""
        return self.planner.plan

    @property
    def sites(self) -> tuple[PlannedSite, ...]:
        """The sites of the plan, each with its options."""
        return planned_sites(self.plan, self.options)

    def attach(self) -> bool:
        """Give every site its parameters.

        Return whether any were missing, so that the graph must be traced again to see them.

        Sites that cannot share the parameters of their module are rejected, and the plan is made
        again.
        """
        parameters = ModuleParameters(self.graph, self.provenance)
        planned = parameters.resolve(self.planner, self.options)
        root, ddp = self.provenance.root, ddp_parameters(self.provenance.frame)
        blocks = self._equivalent_blocks(parameters, planned)
        lengths = {site: len(chain.sites) for chain in self.plan.chains for site in chain.sites}
        changed = False
        for one in planned:
            owner, declaring_module = parameters.modules(one.site)
            check_site(one.site, owner, find_connection(owner, one.site), ddp)
            changed |= attach_site(
                owner,
                declaring_module,
                one.site,
                one.options,
                index=blocks.number * lengths[one.site] + one.index,
                dtype=one.dtype,
                last=one.last,
                root=root,
            )
        for number, block in blocks.others.items():
            assert root is not None
            for one in planned:
                index = number * lengths[one.site] + one.index
                attach_like(block, root, one.site, one.options, index=index, dtype=one.dtype)
        if changed:
            settle()
            follow_averages()
            self._forget_heads()
            log.info("attached hyper-connections to %d sites", len(planned))
        return changed

    def rewrite(self) -> Graph:
        """Return the graph on streams, with `mhc::` operators; where nothing is to be rewritten, the normalised graph.

        Raises:
            NothingRewrittenError, StreamsLostError: with `strict`, where a warning would be given
            otherwise.
        """
        parameters = ModuleParameters(self.graph, self.provenance)
        self.planner.settle(lambda plan: parameters.undeclared(planned_sites(plan, self.options)))
        bindings = {one.site: parameters.bind(one) for one in self.sites}
        openings = parameters.openings(self.plan)
        self._report([*bindings.values(), *(binding for _, binding in openings.values())])
        if not bindings and not openings:
            if self._should_have_sites():
                warn_nothing_rewritten(self.plan.rejections, self.options, [self.graph])
            # Declarations of sites that other graphs of the model rewrite are not for the inner
            # compiler's eyes.
            return close_regions(self.graph)
        warn_of_pipeline(self.provenance.frame)
        return expand_plan(self.graph, self.plan, bindings, openings=openings)

    @property
    def is_plain(self) -> bool:
        """Whether the graph has neither sites nor beginnings of their branches, so that a compiled version of it has no streams."""
        return not self.plan.sites and not ModuleParameters(self.graph, self.provenance).openings(self.plan)

    def annotations(self) -> Notes:
        """Return what the compiled graph writes into the history of its results, so that a later graph finds the heads of its branches."""
        placeholders = [str(node.target) for node in self.graph.find_nodes(op="placeholder")]
        positions = {target: position for position, target in enumerate(placeholders)}
        results: Any = self.graph.output_node().args[0]
        return Notes(self.plan.heads, self.provenance, positions, results)

    def _report(self, bindings: list[Binding]) -> None:
        for chain in self.plan.chains:
            paths = ", ".join(site.path for site in chain.sites)
            log.info("chain of %d sites, width %d: %s", len(chain.sites), chain.width, paths)
        for rejection in self.plan.rejections:
            log.debug("rejected %s: %s", rejection.add, rejection)
            if rejection.reason is Reason.BROKEN_BRANCH:
                warn_split_branch(rejection, self.provenance, self.options)
        unused = self._unused(bindings)
        # Of a branch in two halves, the graph that is traced first knows nothing yet.
        if unused and not self.provenance.frame.is_part:
            warn_unused(unused, self.plan.rejections, self.options)

    def _unused(self, bindings: Iterable[Binding]) -> list[str]:
        """The paths of hyper-connections that are declared in the graph as Dynamo made it, and that no site uses."""
        used = {str(binding.phi.target) for binding in bindings if isinstance(binding.phi, Node)}
        captured = self.captured.graph
        shown = [node.args[0] for node in captured.nodes if node.target is torch.ops.mhc.declare]
        names = {node.target: self.provenance.parameter_name(node) for node in captured.find_nodes(op="placeholder")}
        idle = [names.get(phi.target) for phi in shown if isinstance(phi, Node) and str(phi.target) not in used]
        # A read-out stays with its site where the chain has grown beyond it.
        return list(dict.fromkeys(name.removesuffix(".phi") for name in idle if name and name.endswith(".phi")))

    def _should_have_sites(self) -> bool:
        """Whether a user expects residual adds here: not in a loss function or an embedding that Dynamo compiles by itself.

        Of a model in pieces, the last piece answers for all, and for the modules that Dynamo
        compiles by themselves because of a graph break.
        """
        root, frame = self.provenance.root, self.provenance.frame
        if root is None or connections(root) or not any(is_contraction(node) for node in self.graph.nodes):
            return False
        return not frame.ends_at_break and not frame.runs_inside_another(root)

    def _equivalent_blocks(self, parameters: ModuleParameters, planned: Iterable[PlannedSite]) -> EquivalentBlocks:
        """The blocks that will run with this graph, if it is about to get hyper-connections."""
        root: nn.Module | None = self.provenance.root
        if root is None or all(parameters.existing(one) is not None for one in planned):
            return EquivalentBlocks(0, {})
        return equivalent_blocks(root, self.provenance.frame)

    def _forget_heads(self) -> None:
        """Have the graphs traced again in which branches of this graph's sites begin: they do not know of it yet."""
        for site in self.plan.sites:
            for head in site.heads:
                code = head.code()
                if code is not None and code is not self.provenance.frame.code:
                    _torch.forget_compiled(code, all_entries=False)

    def _check_overrides(self) -> None:
        """Warn of patterns of `overrides` that fit no site.

        A piece of a model knows its own sites only: nothing is said there.
        """
        overrides, plan = self.options.overrides, self.plan
        if not overrides or not plan.sites or self.provenance.frame.is_part:
            return
        paths = [site.path.replace(".mhc.", ".") for site in plan.sites]
        used = {pattern for path in paths for pattern in self.options.matching(path)}
        for pattern in overrides:
            if pattern not in used:
                near = difflib.get_close_matches(pattern, paths, n=1, cutoff=0.0)[0]
                warn(
                    f"option 'overrides': {pattern!r} fits no site of this graph, whose {len(paths)} sites are called like {near!r}"
                )


analyze_graph = GraphSession.analyze
