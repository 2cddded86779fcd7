"""One Dynamo graph, studied: what would be rewritten and what not. `explain`, `attach` and the backend all start here."""

from __future__ import annotations

import difflib
import logging
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from mhc_compile import _torch
from mhc_compile._warn import warn
from mhc_compile.attachment.averaged_model import follow_averages
from mhc_compile.attachment.optimizers import settle
from mhc_compile.attachment.sites import attach_like, attach_site, begun_by, find_connection
from mhc_compile.capture.equivalent_blocks import Siblings, siblings
from mhc_compile.capture.provenance import DynamoProvenance
from mhc_compile.compilation.bindings import bind_connection
from mhc_compile.distributed.guards import check_site, known_to_ddp
from mhc_compile.errors import AttachError, NothingRewrittenError, StreamsLostError
from mhc_compile.graph_breaks.split_branches import Notes, find_tail
from mhc_compile.graph_breaks.stream_registry import carried_axis
from mhc_compile.modules.gated import create_connection
from mhc_compile.modules.hyper_connection import parameter_dtype
from mhc_compile.passes import Plan, Reason, Rejection, Site, normalize, plan_chains
from mhc_compile.passes.analysis.op_info import is_fused_layer, is_region, op_name, tensor_value
from mhc_compile.passes.analysis.provenance import source_line
from mhc_compile.passes.planning.chains import reject_site
from mhc_compile.passes.planning.graph_boundary import BoundaryInfo

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch import nn
    from torch.fx import Graph

    from mhc_compile.config.options import ResolvedOptions
    from mhc_compile.modules.hyper_connection import HyperConnection
    from mhc_compile.passes.planning.split_branches import BranchHead
    from mhc_compile.passes.transforms.stream_builder import Binding

__all__ = ["Study", "complain", "report_broken", "report_idle", "study", "width_conflict"]

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Study:
    """A normalised graph and the plan for it. Valid while Dynamo traces the frame."""

    graph: Graph
    provenance: DynamoProvenance
    plan: Plan
    min_chain_length: int
    edges: BoundaryInfo
    _vetoes: dict[Node, Rejection] = field(default_factory=dict)

    def attach(self, options: ResolvedOptions) -> bool:
        """Gives every site its parameters; returns whether any were missing, so that the graph must be traced again to see them.

        Sites that cannot share the parameters of their module are rejected, and the plan is made anew.
        """
        changed = False
        family = self._family()
        root = self.provenance.root
        known = known_to_ddp()
        while True:
            vetoes = dict(self._vetoes)
            for chain in self.plan.chains:
                for index, site in enumerate(chain.sites):
                    owner, declaring_module = self._modules(site)
                    connection = find_connection(owner, site)
                    if connection is not None and connection.width != site.width:
                        vetoes[site.add] = width_conflict(site, connection)
                        continue
                    check_site(site, owner, connection, known)
                    first = family.number * len(chain.sites)
                    last = site is chain.sites[-1]
                    changed |= attach_site(
                        owner, declaring_module, site, options, index=first + index, last=last, root=root
                    )
            if len(vetoes) == len(self._vetoes):
                break
            self._replan(vetoes)
        for number, sibling in family.others.items():
            for chain in self.plan.chains:
                for index, site in enumerate(chain.sites):
                    assert root is not None
                    attach_like(sibling, root, site, options, index=number * len(chain.sites) + index)
        if changed:
            settle()
            follow_averages()
            self._forget_heads()
        return changed

    def _forget_heads(self) -> None:
        """Lets the graphs be traced again in which branches of this graph's sites began: they do not know of it yet."""
        for site in self.plan.sites:
            for head in site.heads:
                code = head.code()
                if code is not None and code is not _torch.frame_code():
                    _torch.forget_compiled(code, all_entries=False)

    def _family(self) -> Siblings:
        """The blocks that will run with the graph of this one, if this graph is about to get hyper-connections."""
        root = self.provenance.root
        if root is None or not any(find_connection(self._modules(site)[0], site) is None for site in self.plan.sites):
            return Siblings(0, {})
        return siblings(root)

    def bind(self) -> dict[Site, Binding]:
        """The graph inputs that are each site's parameters. Sites whose parameters did not enter the graph are rejected."""
        inputs = {str(node.target): node for node in self.graph.nodes if node.op == "placeholder"}
        while True:
            vetoes = dict(self._vetoes)
            bindings: dict[Site, Binding] = {}
            for site in self.plan.sites:
                owner, _ = self._modules(site)
                connection = find_connection(owner, site)
                binding = None
                if connection is not None:
                    binding = self._without_parameters(connection) if site.tail else self._binding(connection, inputs)
                if binding is None:
                    vetoes[site.add] = _not_declared(site)
                else:
                    bindings[site] = binding
            if len(vetoes) == len(self._vetoes):
                return bindings
            self._replan(vetoes)

    def foresee(self, options: ResolvedOptions) -> tuple[dict[Site, Binding], frozenset[str]]:
        """What `bind` will find once the sites are attached, and the paths of the parameters for which graph inputs were added.

        Sites that cannot share the parameters of their module are rejected, as `attach` rejects them. The modules stay as they are.
        """
        inputs = {str(node.target): node for node in self.graph.find_nodes(op="placeholder")}
        new: dict[str, Node] = {}
        while True:
            vetoes = dict(self._vetoes)
            bindings: dict[Site, Binding] = {}
            widths: dict[str, HyperConnection] = {}
            ends = {chain.sites[-1] for chain in self.plan.chains}
            for site in self.plan.sites:
                connection, last = find_connection(self._modules(site)[0], site), site in ends
                if connection is None or (last and connection.lacks_end):
                    connection = widths.get(site.path)
                    if connection is None:
                        connection = create_connection(site.width, options.at(site.path), last=last, device="meta")
                        widths[site.path] = connection
                if connection.width != site.width:
                    vetoes[site.add] = width_conflict(site, connection)
                    continue
                binding = self._without_parameters(connection) if site.tail else self._binding(connection, inputs)
                value = tensor_value(site.add)
                assert value is not None
                bindings[site] = binding or self._stand_in(site.path, connection, value, new)
            if len(vetoes) == len(self._vetoes):
                return bindings, frozenset(new)
            self._replan(vetoes)

    def foresee_openings(
        self, begun: Mapping[nn.Module, Sequence[Site]], options: ResolvedOptions
    ) -> tuple[dict[BranchHead, tuple[str, Binding]], frozenset[str]]:
        """What `openings` will find once the sites are attached whose branches begin in this graph; see `foresee`.

        `begun` says of modules which sites end the branches that they begin.
        """
        found = self.openings()
        new: dict[str, Node] = {}
        for head in self.plan.heads:
            sites = [
                begun.get(module, ()) for ref in head.modules if (module := self.provenance.module(ref)) is not None
            ]
            common = [site for site in sites[0] if all(site in more for more in sites)] if sites else []
            value = tensor_value(head.value)
            if head not in found and len(common) == 1 and value is not None:
                connection = create_connection(common[0].width, options.at(common[0].path), device="meta")
                found[head] = common[0].name, self._stand_in(common[0].path, connection, value, new)
        return found, frozenset(new)

    def _stand_in(self, site: str, connection: HyperConnection, like: torch.Tensor, new: dict[str, Node]) -> Binding:
        """Graph inputs for the parameters at the path `site`, of the kind that a trunk value `like` asks for."""
        dtype = parameter_dtype(like)

        def stand_in(part: str) -> Node:
            path = f"{site}.{part}"
            if path not in new:
                last = next(node for node in reversed(self.graph.nodes) if node.op == "placeholder")
                with self.graph.inserting_after(last):
                    node = new[path] = self.graph.placeholder(path.replace(".", "_"))
                    node.target = node.name  # an argument of the graph's code; a path may begin with a digit: "1.mhc.f"
                with like.fake_mode:  # type: ignore[attr-defined]
                    shape = connection.get_parameter(part).shape
                    node.meta["example_value"] = torch.empty(shape, dtype=dtype, device=like.device)
                self.provenance.name_parameter(node, path)
            return new[path]

        binding = bind_connection(connection, stand_in)
        assert binding is not None
        return binding

    def openings(self) -> dict[BranchHead, tuple[str, Binding]]:
        """The heads of the plan whose branches are known to end in other graphs, with the names of their sites and the parameters."""
        inputs = {str(node.target): node for node in self.graph.nodes if node.op == "placeholder"}
        found: dict[BranchHead, tuple[str, Binding]] = {}
        for head in self.plan.heads:
            begun = begun_by([self.provenance.module(ref) for ref in head.modules])
            binding = self._binding(begun[1], inputs) if begun is not None else None
            if begun is not None and binding is not None:
                found[head] = begun[0], binding
        return found

    def idle(self, declared: Graph, bindings: Iterable[Binding]) -> list[str]:
        """The paths of hyper-connections that are declared in the graph as Dynamo made it, and of whose sites it makes nothing."""
        used = {str(binding.phi.target) for binding in bindings if isinstance(binding.phi, Node)}
        shown = [node.args[0] for node in declared.nodes if node.target is torch.ops.mhc.declare]
        names = {node.target: self.provenance.parameter_name(node) for node in declared.find_nodes(op="placeholder")}
        idle = [names.get(phi.target) for phi in shown if isinstance(phi, Node) and str(phi.target) not in used]
        # A read-out stays with its site where the chain has grown beyond it.
        return list(dict.fromkeys(name.removesuffix(".phi") for name in idle if name and name.endswith(".phi")))

    def notes(self) -> Notes:
        """What the compiled graph writes into the history of its results, so that a later graph finds the heads of its branches."""
        placeholders = [str(node.target) for node in self.graph.find_nodes(op="placeholder")]
        positions = {target: position for position, target in enumerate(placeholders)}
        results: Any = self.graph.output_node().args[0]
        return Notes(self.plan.heads, self.provenance, positions, results)

    def _without_parameters(self, connection: HyperConnection) -> Binding:
        binding = bind_connection(connection, lambda name: "")  # noqa: ARG005 - they are in the graph where the branch begins
        assert binding is not None
        return binding

    def _binding(self, connection: HyperConnection, inputs: dict[str, Node]) -> Binding | None:
        def find(name: str) -> Node | None:
            target = self.provenance.target_of(connection.get_parameter(name))
            return None if target is None else inputs[str(target)]

        return bind_connection(connection, find)

    def _modules(self, site: Site) -> tuple[nn.Module, nn.Module]:
        owner, declaring_module = self.provenance.module(site.owner), self.provenance.module(site.declaring_module)
        assert owner is not None, f"{site}: Dynamo names module {site.owner} that it does not know"
        assert declaring_module is not None, (
            f"{site}: Dynamo names module {site.declaring_module} that it does not know"
        )
        return owner, declaring_module

    def _replan(self, vetoes: dict[Node, Rejection]) -> None:
        self._vetoes = vetoes
        self.plan = plan_chains(
            self.graph,
            self.provenance,
            min_chain_length=self.min_chain_length,
            reject=lambda site: vetoes.get(site.add),
            edges=self.edges,
        )


def study(graph_module: torch.fx.GraphModule, inputs: list[Any], options: ResolvedOptions) -> Study:
    """Normalises the graph that Dynamo handed over, finds its sites and plans its chains. The graph itself stays as it is."""
    graph = normalize(graph_module.graph)
    provenance = DynamoProvenance(graph, inputs)
    edges = _edges(graph, provenance, inputs)
    plan = plan_chains(graph, provenance, min_chain_length=options.min_chain_length, edges=edges)
    if options.read_out != "mean" or options.single_pass:
        _check_whole(plan, edges, options, provenance.root)
        # A value that happens to be a result of the graph ends its chain as any other reader does.
        edges = BoundaryInfo(tail=edges.tail, attached=edges.attached)
        plan = plan_chains(graph, provenance, min_chain_length=options.min_chain_length, edges=edges)
    _check_patterns(plan, options)
    return Study(graph, provenance, plan, options.min_chain_length, edges)


def _check_patterns(plan: Plan, options: ResolvedOptions) -> None:
    """Warns of patterns of the option `sites` that fit no site. Of a model in pieces each graph knows its own sites only: nothing is said there."""
    if not options.overrides or not plan.sites or _torch.graph_is_part():
        return
    paths = [site.path.replace(".mhc.", ".") for site in plan.sites]
    used = {pattern for path in paths for pattern in options.matching(path)}
    for pattern in options.overrides:
        if pattern not in used:
            near = difflib.get_close_matches(pattern, paths, n=1, cutoff=0.0)[0]
            warn(
                f"option 'overrides': {pattern!r} fits no site of this graph, whose {len(paths)} sites are called like {near!r}"
            )


def _check_whole(plan: Plan, edges: BoundaryInfo, options: ResolvedOptions, root: nn.Module | None) -> None:
    """Streams that ride from graph to graph are read out as their mean where they end; other ends need the whole chain in one graph.

    Raises:
        AttachError: a chain comes from another graph, or may go on in one.
    """
    alone = root is not None and _torch.runs_inside_another(root, compiled_alone=True)
    for chain in plan.chains:
        # Of blocks that are compiled one by one, each takes its trunk from outside and gives it back.
        part = edges.part or (alone and chain.arrives)
        goes_on = part and (chain.departures or any(site.tail for site in chain.sites))
        if chain.start in edges.arriving or goes_on:
            asked = "single_pass=True" if options.single_pass else f"read_out={options.read_out!r}"
            raise AttachError(
                f"{chain.sites[0]}: its chain runs through several graphs, and {asked} needs it whole. Find the graph break (mhc explain shows the"
                " pieces; torch.compile(fullgraph=True) names it) and compile the model as a whole, or use read_out='mean', single_pass=False"
            )


def _edges(graph: Graph, provenance: DynamoProvenance, inputs: list[Any]) -> BoundaryInfo:
    placeholders = zip(graph.find_nodes(op="placeholder"), inputs, strict=True)
    values = {
        node: value for node, value in placeholders if _is_activation(node) and not provenance.holds_weights(node)
    }

    def attached(site: Site) -> bool:
        owner = provenance.module(site.owner)
        return owner is not None and find_connection(owner, site) is not None

    arriving = {node: axis for node, value in values.items() if (axis := carried_axis(value)) is not None}
    return BoundaryInfo(
        _torch.graph_is_part(), frozenset(values), arriving, attached, partial(find_tail, provenance, values)
    )


def _is_activation(node: Node) -> bool:
    value = tensor_value(node)
    return value is not None and value.is_floating_point() and value.dim() > 1


def complain(rejections: Iterable[Rejection], options: ResolvedOptions, graphs: Iterable[Graph] = ()) -> None:
    """Says that nothing was rewritten in `graphs`, and why: a warning, or an error with `strict`.

    Raises:
        NothingRewrittenError: `options.strict`.
    """
    reasons = Counter(rejection.reason.value for rejection in rejections)
    listed = ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
    found = (
        f"{sum(reasons.values())} floating-point additions, all rejected ({listed})"
        if reasons
        else "no addition of floating-point tensors"
    )
    message = (
        f"nothing was rewritten: the model has {found}. It runs as the plain model.{_hint(graphs)}"
        " `mhc explain` or mhc_compile.explain(model, ...) shows each addition with its reason"
    )
    if options.strict:
        raise NothingRewrittenError(message)
    warn(message)


def _hint(graphs: Iterable[Graph]) -> str:
    graphs = list(graphs)
    regions = sorted({op_name(node) for graph in graphs for node in graph.nodes if is_region(node)})
    if regions:
        return f" It has regions that are not looked into ({', '.join(regions)}): residual adds inside them are left alone."
    if any(is_fused_layer(node) for graph in graphs for node in graph.nodes):
        return (
            " It runs torch's fused encoder layer, as nn.TransformerEncoder does in eval mode without gradients: call it once in training mode,"
            " or mhc_compile.attach(model, ...), and it will take the path that can be rewritten."
        )
    return ""


def report_idle(idle: list[str], rejections: Iterable[Rejection], options: ResolvedOptions) -> None:
    """Says that hyper-connections of modules that run in a graph have no part in it, so that their residual adds are plain ones.

    Raises:
        NothingRewrittenError: `options.strict`.
    """
    reasons = Counter(rejection.reason.value for rejection in rejections)
    listed = ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
    left = f"additions left alone: {listed}" if reasons else "there is no other addition of floating-point tensors"
    message = (
        f"{len(idle)} hyper-connections have no part in a graph in which their modules run ({idle[0]}{', ...' if len(idle) > 1 else ''}):"
        f" their residual adds run as plain adds ({left}). mhc_compile.explain(model, ...) shows each addition with its reason"
    )
    if options.strict:
        raise NothingRewrittenError(message)
    warn(message)


def report_broken(rejection: Rejection, provenance: DynamoProvenance, options: ResolvedOptions) -> None:
    """Says that a residual add stays plain, and ends the streams of its trunk, because of where its branch ran.

    Raises:
        StreamsLostError: `options.strict`.
    """
    owner = rejection.module_path or (type(provenance.root).__name__ if provenance.root is not None else "a function")
    message = (
        f"a residual add of {owner} ({source_line(rejection.add)}) stays as it is, and the streams of its trunk end there: {rejection.message}."
        " Let a module that is compiled be the first to read the trunk in the branch (a norm, a projection)"
    )
    if options.strict:
        raise StreamsLostError(message)
    warn(message)


def width_conflict(site: Site, connection: HyperConnection) -> Rejection:
    """The rejection of a site whose module already serves another width."""
    return reject_site(
        site,
        Reason.WIDTH_CONFLICT,
        lambda: f"{site.path} has width {connection.width}, and this call needs {site.width}",
    )


def _not_declared(site: Site) -> Rejection:
    return reject_site(
        site,
        Reason.NOT_DECLARED,
        lambda: (
            f"the call of {site.declaring_module.path or site.declaring_module.kind} did not declare {site.path} to the tracer"
        ),
    )
