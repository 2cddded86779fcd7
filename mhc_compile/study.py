"""One Dynamo graph, studied: what would be rewritten and what not. `explain`, `attach` and the backend all start here."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mhc_compile._warn import warn
from mhc_compile.attachment import attach_site, find_connection
from mhc_compile.dynamo import DynamoProvenance
from mhc_compile.errors import NothingRewrittenError
from mhc_compile.passes import Binding, Plan, Reason, Refusal, Site, normalize, plan_chains, refuse_site
from mhc_compile.passes.roles import is_fused_layer, is_region, op_name
from mhc_compile.wrapped import check_site, known_to_ddp

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import nn
    from torch.fx import Graph, Node

    from mhc_compile.connection import HyperConnection
    from mhc_compile.options import Options

__all__ = ["Study", "complain", "study", "width_conflict"]

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Study:
    """A normalised graph and the plan for it. Valid while Dynamo traces the frame."""

    graph: Graph
    provenance: DynamoProvenance
    plan: Plan
    min_sites: int
    _vetoes: dict[Node, Refusal] = field(default_factory=dict)

    def attach(self, options: Options) -> bool:
        """Gives every site its parameters; returns whether any were missing, so that the graph must be traced again to see them.

        Sites that cannot share the parameters of their module are refused, and the plan is made anew.
        """
        changed = False
        known = known_to_ddp()
        while True:
            vetoes = dict(self._vetoes)
            for chain in self.plan.chains:
                for index, site in enumerate(chain.sites):
                    owner, carrier = self._modules(site)
                    connection = find_connection(owner, site)
                    if connection is not None and connection.width != site.width:
                        vetoes[site.add] = width_conflict(site, connection)
                        continue
                    check_site(site, owner, connection, known)
                    changed |= attach_site(owner, carrier, site, options, index=index)
            if len(vetoes) == len(self._vetoes):
                return changed
            self._replan(vetoes)

    def bind(self) -> dict[Site, Binding]:
        """The graph inputs that are each site's parameters. Sites whose parameters did not enter the graph are refused."""
        inputs = {str(node.target): node for node in self.graph.nodes if node.op == "placeholder"}
        while True:
            vetoes = dict(self._vetoes)
            bindings: dict[Site, Binding] = {}
            for site in self.plan.sites:
                owner, _ = self._modules(site)
                connection = find_connection(owner, site)
                binding = self._binding(connection, inputs) if connection is not None else None
                if binding is None:
                    vetoes[site.add] = _not_declared(site)
                else:
                    bindings[site] = binding
            if len(vetoes) == len(self._vetoes):
                return bindings
            self._replan(vetoes)

    def _binding(self, connection: HyperConnection, inputs: dict[str, Node]) -> Binding | None:
        targets = [
            self.provenance.target_of(parameter) for parameter in (connection.phi, connection.bias, connection.scale)
        ]
        if any(target is None for target in targets):
            return None
        phi, bias, scale = (inputs[str(target)] for target in targets)
        return Binding(phi, bias, scale, connection.streams, connection.mapping, connection.iterations, connection.eps)

    def _modules(self, site: Site) -> tuple[nn.Module, nn.Module]:
        owner, carrier = self.provenance.module(site.owner), self.provenance.module(site.carrier)
        assert owner is not None, f"{site}: Dynamo names module {site.owner} that it does not know"
        assert carrier is not None, f"{site}: Dynamo names module {site.carrier} that it does not know"
        return owner, carrier

    def _replan(self, vetoes: dict[Node, Refusal]) -> None:
        self._vetoes = vetoes
        self.plan = plan_chains(
            self.graph, self.provenance, min_sites=self.min_sites, refuse=lambda site: vetoes.get(site.add)
        )


def study(graph_module: torch.fx.GraphModule, inputs: list[Any], options: Options) -> Study:
    """Normalises the graph that Dynamo handed over, finds its sites and plans its chains. The graph itself stays as it is."""
    graph = normalize(graph_module.graph)
    provenance = DynamoProvenance(graph, inputs)
    plan = plan_chains(graph, provenance, min_sites=options.min_sites)
    return Study(graph, provenance, plan, options.min_sites)


def complain(refusals: Iterable[Refusal], options: Options, graphs: Iterable[Graph] = ()) -> None:
    """Says that nothing was rewritten in `graphs`, and why: a warning, or an error with `strict`.

    Raises:
        NothingRewrittenError: `options.strict`.
    """
    reasons = Counter(refusal.reason.value for refusal in refusals)
    listed = ", ".join(f"{count} × {reason}" for reason, count in reasons.most_common())
    found = (
        f"{sum(reasons.values())} floating-point additions, all refused ({listed})"
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


def width_conflict(site: Site, connection: HyperConnection) -> Refusal:
    """The refusal of a site whose module already serves another width."""
    return refuse_site(
        site,
        Reason.WIDTH_CONFLICT,
        lambda: f"{site.path} has width {connection.width}, and this call needs {site.width}",
    )


def _not_declared(site: Site) -> Refusal:
    return refuse_site(
        site,
        Reason.NOT_DECLARED,
        lambda: f"the call of {site.carrier.path or site.carrier.kind} did not declare {site.path} to the tracer",
    )
