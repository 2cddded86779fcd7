"""A captured graph on its way to the inner compiler.

    GraphSession.analyze   normalise the graph, find its sites, plan their chains
    GraphSession.attach    create missing parameters; the caller then restarts the trace
    GraphSession.rewrite   bind parameters to graph inputs, expand the graph onto streams

`explain` and `diff` stop at the plan, `mhc_compile.attach` at the parameters.
"""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from mhc_compile import _torch
from mhc_compile.attachment.averaged_model import follow_averages
from mhc_compile.attachment.declaration import begin_branch
from mhc_compile.attachment.model_tree import connections, find_connection
from mhc_compile.attachment.optimizers import settle
from mhc_compile.attachment.plan import settings_of
from mhc_compile.attachment.sites import attach_like, attach_site, begin_like
from mhc_compile.capture.equivalent_blocks import EquivalentBlocks, equivalent_blocks
from mhc_compile.capture.frame import read_frame
from mhc_compile.capture.provenance import DynamoProvenance
from mhc_compile.compilation import run_settings
from mhc_compile.compilation.bindings import PlannedSite, planned_sites
from mhc_compile.compilation.boundary_analysis import analyze_boundary, check_whole
from mhc_compile.compilation.faults import Fault, failed_plan, is_fault
from mhc_compile.compilation.messages import warn_nothing_rewritten, warn_split_branch, warn_unused
from mhc_compile.compilation.module_parameters import ModuleParameters
from mhc_compile.compilation.regions import lacks_sites
from mhc_compile.distributed.guards import check_frame, check_site, warn_of_pipeline
from mhc_compile.distributed.late_parameters import follow, parts, wrappers_of
from mhc_compile.errors import warn
from mhc_compile.graph_breaks.runtime import Tail
from mhc_compile.graph_breaks.split_branches import Notes
from mhc_compile.passes import Reason, close_regions, expand_plan, normalize
from mhc_compile.passes.analysis.op_info import is_contraction
from mhc_compile.passes.planning.graph_boundary import BoundaryInfo
from mhc_compile.passes.planning.planner import Planner
from mhc_compile.passes.transforms.expand_streams import without_declarations

if TYPE_CHECKING:
    from collections.abc import Container

    from torch import nn
    from torch.fx import Graph

    from mhc_compile.config.options import ResolvedOptions
    from mhc_compile.modules.hyper_connection import HyperConnection
    from mhc_compile.passes import Plan

log = logging.getLogger(__name__)

#: The no-op that shows a hyper-connection, as a graph may have it.
DECLARE = (torch.ops.mhc.declare, torch.ops.mhc.declare.default)


@dataclass(frozen=True, eq=False)
class Use:
    """A site with parameters among the inputs of a graph: its path, the target of phi."""

    path: str
    phi: str
    connection: HyperConnection


@dataclass(eq=False)
class GraphSession:
    """A normalised graph, its plan and its modules. Valid while Dynamo traces the frame."""

    captured: torch.fx.GraphModule
    graph: Graph
    provenance: DynamoProvenance
    options: ResolvedOptions
    planner: Planner
    #: The hyper-connections that `attach` created.
    created: list[HyperConnection] = field(default_factory=list)
    #: What failed, and is still to be reported.
    faults: list[Fault] = field(default_factory=list)
    #: Whether the graph is the captured one: to normalise or plan it failed.
    left_plain: bool = False

    @classmethod
    def analyze(cls, graph_module: torch.fx.GraphModule, inputs: list[Any], options: ResolvedOptions) -> GraphSession:
        """Normalise a copy of a captured graph, find its sites and plan their chains."""
        try:
            return cls._analyze(graph_module, inputs, options)
        except Exception as error:
            if not is_fault(error):
                raise
            log.debug("a graph could not be analyzed", exc_info=True)
            graph = graph_module.graph
            provenance = DynamoProvenance(graph, inputs, read_frame())
            session = cls(graph_module, graph, provenance, options, Planner(graph, provenance))
            session.leave_plain(error)
            return session

    @classmethod
    def _analyze(cls, graph_module: torch.fx.GraphModule, inputs: list[Any], options: ResolvedOptions) -> GraphSession:
        graph = normalize(graph_module.graph)
        provenance = DynamoProvenance(graph, inputs, read_frame())
        boundary = analyze_boundary(graph, provenance, inputs)
        planner = Planner(graph, provenance, options.min_chain_length, boundary)
        ends_alone = options.read_out != "mean" or options.single_pass
        if ends_alone:
            check_whole(planner.plan, boundary, options, provenance)
        if ends_alone or provenance.frame.is_whole_model:
            # With the whole chain here, a graph result ends a chain as any other reader does.
            boundary = BoundaryInfo(tail=boundary.tail, attached=boundary.attached)
            planner = Planner(graph, provenance, options.min_chain_length, boundary)
        session = cls(graph_module, graph, provenance, options, planner)
        session._check_overrides()
        return session

    def leave_plain(self, error: Exception) -> None:
        """Replace the graph by the captured one, without sites, because of `error`."""
        self.graph, self.left_plain = without_declarations(self.captured.graph), True
        self.planner = Planner(self.graph, self.provenance)
        self.planner.replace_plan(failed_plan(self.graph, self.provenance, error))
        self.faults.append(Fault(error))
        self.__dict__.pop("parameters", None)  # those of the other graph

    @cached_property
    def parameters(self) -> ModuleParameters:
        """The parameters of the sites, as inputs of the graph."""
        return ModuleParameters(self.graph, self.provenance)

    def swaps_parameters(self) -> bool:
        """Return whether hyper-connections have other parameters here than their modules hold.

        A function that calls `functional_call` hands them over as arguments or computes them.
        """
        shown = (node.args[0] for node in self.captured.graph.nodes if node.target in DECLARE)
        return any(isinstance(phi, Node) and self.provenance.parameter_name(phi) is None for phi in shown)

    def models(self) -> list[nn.Module]:
        """Return the outermost modules around the sites of the graph, and the equivalent blocks."""
        root, found = self.provenance.root, []
        for site in self.plan.sites:
            owner = self.parameters.modules(site)[0]
            found.append(self.provenance.model_around(site.add, owner) or owner)
        others = equivalent_blocks(root, self.provenance.frame).others.values() if root is not None else ()
        return list(dict.fromkeys([*found, *others]))

    @property
    def plan(self) -> Plan:
        """The current plan."""
        return self.planner.plan

    @property
    def sites(self) -> tuple[PlannedSite, ...]:
        """The sites of the plan, each with its options."""
        return planned_sites(self.plan, self.options)

    def attach(self, *, create: bool = True) -> bool:
        """Create the missing parameters of all sites. Return True if any were missing.

        A site whose module holds parameters of another width is rejected. Without `create`, only
        existing parameters are declared, at the places where this trace looks for them.
        """
        root, frame, parameters = self.provenance.root, self.provenance.frame, self.parameters
        if not run_settings.planning:
            check_frame(frame)
        planned = parameters.resolve(self.planner, self.options)
        if not create:
            planned = tuple(item for item in planned if parameters.existing(item) is not None)
        blocks, existing = EquivalentBlocks(0, {}), [parameters.existing(item) for item in planned]
        foreseen = parameters.foresee(self.plan)
        unbegun = foreseen or any(not parameters.is_begun(item) for item in planned)
        if root is not None and (None in existing or unbegun):
            blocks = equivalent_blocks(root, frame)
        owners = [parameters.modules(item.site)[0] for item in planned]
        wrappers = [frame.ddp] if frame.ddp is not None else wrappers_of(owners, existing)
        known = parts(wrappers)
        lengths = {site: len(chain.sites) for chain in self.plan.chains for site in chain.sites}
        changed = False
        for head, (name, connection) in foreseen.items():
            assert root is not None
            modules = [module for ref in head.modules if (module := self.provenance.module(ref)) is not None]
            changed |= begin_branch(modules, connection, name)
            for block in blocks.others.values():
                begin_like(block, root, modules, connection)
        for item in planned:
            site, index = item.site, blocks.number * lengths[item.site] + item.index
            owner, declaring_module = parameters.modules(site)
            if not run_settings.planning:
                check_site(site, owner, find_connection(owner, site), wrappers)
            model = self.provenance.model_around(site.add, owner)
            had = find_connection(owner, site)
            options = item.options if create or had is None else replace(item.options, **settings_of(had))
            changed |= attach_site(
                owner, declaring_module, site, options, index=index, dtype=item.dtype, last=item.last, root=model
            )
        new = zip(planned, existing, strict=True)
        self.created = [
            found for item, before in new if before is None and (found := parameters.existing(item)) is not None
        ]
        for number, block in blocks.others.items() if create else ():
            assert root is not None
            for item in planned:
                index = number * lengths[item.site] + item.index
                attach_like(block, root, item.site, item.options, index=index, dtype=item.dtype)
        for ddp in wrappers if not run_settings.planning else ():
            follow(ddp, known)
        if changed:
            settle()
            follow_averages()
            for head in (head for site in self.plan.sites for head in site.heads):
                code = head.code()  # of an earlier graph, which must declare the new parameters
                if code is not None and code is not frame.code:
                    _torch.forget_compiled(code, all_entries=False)
            log.info("attached hyper-connections to %d sites", len(planned))
        return changed

    def rewrite(self) -> Graph:
        """Return the graph on streams, with `mhc::` operators; without sites, the plain graph."""
        parameters = self.parameters
        self.planner.settle(lambda plan: parameters.undeclared(planned_sites(plan, self.options)))
        bindings = {item.site: parameters.bind(item) for item in self.sites}
        openings = parameters.openings(self.plan)
        if self.left_plain:
            return self.graph
        if not bindings and not openings:
            # Sites of other graphs may be declared here; the inner compiler must not see that.
            return close_regions(self.graph)
        return expand_plan(self.graph, self.plan, bindings, openings=openings)

    def uses(self) -> tuple[list[Use], list[Use]]:
        """Return the parameters of the sites, without tails, and of the branches begun here."""
        parameters = self.parameters
        found = [(item.site.path, parameters.find(item), parameters.existing(item)) for item in self.sites]
        sites = [
            Use(path, _target(binding.phi), connection)
            for path, binding, connection in found
            if binding is not None and connection is not None
        ]
        heads = [(parameters.begun(head), binding) for head, (_, binding) in parameters.openings(self.plan).items()]
        begun = [Use(name[0], _target(binding.phi), name[1]) for name, binding in heads if name is not None]
        return [use for use in sites if use.phi], begun

    def tails(self, created: Container[HyperConnection], *, fresh: bool) -> dict[str, Tail]:
        """Return the sites whose branches began in other graphs, by the input that is their trunk.

        `created` are the hyper-connections that this trace created before it was restarted, `fresh`
        whether it was.
        """
        found = {}
        for item in self.sites:
            connection = self.parameters.existing(item)
            if item.site.tail and connection is not None:
                starting = connection in created and connection.init == "preserve"
                heads = tuple(head.code for head in item.site.heads)
                found[str(item.site.trunk.target)] = Tail(item.site.path, heads, fresh, starting)
        return found

    @property
    def is_plain(self) -> bool:
        """Whether the compiled graph has no streams: neither sites nor heads of branches."""
        return not self.plan.sites and not self.parameters.openings(self.plan)

    def annotations(self) -> Notes:
        """Return the notes by which a later graph finds the heads of its branches."""
        placeholders = [str(node.target) for node in self.graph.find_nodes(op="placeholder")]
        positions = {target: position for position, target in enumerate(placeholders)}
        results: Any = self.graph.output_node().args[0]
        return Notes(self.plan.heads, self.provenance, positions, results)

    def report(self) -> None:
        """Log chains and rejections, and warn of residual adds that stay plain without a need.

        Raises:
            NothingRewrittenError, StreamsLostError: with `strict`, instead of a warning.
        """
        for chain in self.plan.chains:
            paths = ", ".join(site.path for site in chain.sites)
            log.info("chain of %d sites, width %d: %s", len(chain.sites), chain.width, paths)
        for rejection in self.plan.rejections:
            log.debug("rejected %s: %s", rejection.add, rejection)
            if rejection.reason is Reason.BROKEN_BRANCH:
                warn_split_branch(rejection, self.provenance, self.options)
        if self.faults:  # their own warning follows
            return
        unused = self.idle_connections()
        # The first graph of a split branch cannot know its site yet.
        if unused and not self.provenance.frame.is_part:
            warn_unused(unused, self.plan.rejections, self.options)
        if not self.is_plain:
            warn_of_pipeline(self.provenance.frame)
        elif self._should_have_sites():
            warn_nothing_rewritten(self.plan.rejections, self.options, [self.graph])

    def idle_connections(self) -> list[str]:
        """Return the paths of hyper-connections that the captured graph declares without a site."""
        openings = (binding for _, binding in self.parameters.openings(self.plan).values())
        bindings = (*filter(None, map(self.parameters.find, self.sites)), *openings)
        used = {str(binding.phi.target) for binding in bindings if isinstance(binding.phi, Node)}
        captured = self.captured.graph
        shown = [node.args[0] for node in captured.nodes if node.target in DECLARE]
        names = {node.target: self.provenance.parameter_name(node) for node in captured.find_nodes(op="placeholder")}
        idle = [names.get(phi.target) for phi in shown if isinstance(phi, Node) and str(phi.target) not in used]
        # `.phi` only: a read-out may stay declared at a site that its chain has grown beyond.
        return list(dict.fromkeys(name.removesuffix(".phi") for name in idle if name and name.endswith(".phi")))

    def _should_have_sites(self) -> bool:
        """Return False for all but the last graph of a model, and for parts of one with sites."""
        root, frame = self.provenance.root, self.provenance.frame
        if root is None or connections(root) or frame.ends_at_break or frame.runs_inside_another(root):
            return False
        return lacks_sites(root, frame, contracts=any(is_contraction(node) for node in self.graph.nodes))

    def _check_overrides(self) -> None:
        """Warn of `overrides` patterns that match no site, unless other graphs may have them."""
        overrides, plan = self.options.overrides, self.plan
        if not overrides or not plan.sites or self.provenance.frame.is_part:
            return
        paths = [site.path.replace(".mhc.", ".") for site in plan.sites]
        used = {pattern for path in paths for pattern in self.options.matching(path)}
        for pattern in overrides:
            if pattern not in used:
                near = difflib.get_close_matches(pattern, paths, n=1, cutoff=0.0)[0]
                warn(
                    f"option 'overrides': {pattern!r} fits no site of this graph, whose {len(paths)} sites are"
                    f" called like {near!r}"
                )


def _target(phi: Node | str) -> str:
    return str(phi.target) if isinstance(phi, Node) else phi
