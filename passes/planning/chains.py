"""Plan chains: link the sites that share one set of streams."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from mhc_compile._torch import trace_artifact
from mhc_compile.passes.analysis.op_info import tensor_value
from mhc_compile.passes.planning.chain_rejections import (
    crossed_shortcuts,
    long_skips,
    short_chains,
    side_adds,
)
from mhc_compile.passes.planning.graph_boundary import BoundaryInfo, departures
from mhc_compile.passes.planning.links import link_sites, trunk_paths_to
from mhc_compile.passes.planning.match_residuals import Findings, find
from mhc_compile.passes.planning.plan import Chain, Plan
from mhc_compile.passes.planning.split_branches import find_heads

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.fx import Graph

    from mhc_compile.passes.analysis.aliases import Aliases
    from mhc_compile.passes.analysis.provenance import Provenance
    from mhc_compile.passes.planning.verdict import Rejection, Site

log = logging.getLogger(__name__)


def plan_chains(
    graph: Graph,
    provenance: Provenance,
    *,
    min_chain_length: int = 2,
    reject: Callable[[Site], Rejection | None] | None = None,
    edges: BoundaryInfo = BoundaryInfo(),  # noqa: B008 - frozen
    findings: Findings | None = None,
) -> Plan:
    """Find the sites of a normalised graph and link them into chains.

    A site follows another if its trunk is the other's sum, directly or through liftable trunk
    operations. Where several sites read one trunk value (nested blocks, forks), one of them
    continues the chain and the others begin their own.

    Args:
        graph: a normalised graph with example values.
        provenance: names its modules and parameters.
        min_chain_length: shorter chains are rejected, unless they go on in other graphs. A single
            site inside the branch of another one is always rejected.
        reject: vetoes sites for reasons outside the graph; see `reject_site`.
        edges: what is known of the other graphs of the model.
        findings: those of `find`, where it has been called already.
    """
    started = time.perf_counter()
    findings = find(graph, provenance, edges) if findings is None else findings
    aliases = findings.aliases
    vetoed = {site: rejection for site in findings.sites if reject is not None and (rejection := reject(site))}
    while True:
        sites = [site for site in findings.sites if site not in vetoed]
        by_sum = {site.add: site for site in sites}
        trunk_paths, blocked = trunk_paths_to(sites, by_sum, aliases, edges)
        rejected = long_skips(sites, trunk_paths, by_sum, aliases)
        if not rejected:
            chains = [_at_edges(chain, graph, edges, aliases) for chain in link_sites(sites, trunk_paths, by_sum)]
            whole = [chain for chain in chains if not _goes_on(chain, edges)]
            rejected = side_adds(chains) or crossed_shortcuts(chains) or short_chains(whole, min_chain_length, blocked)
        if not rejected:
            heads = find_heads(graph, provenance, chains, edges, aliases)
            rejections = [*findings.rejections, *vetoed.values()]
            rejections.sort(key=lambda rejection: aliases.order[rejection.add])
            plan = Plan(tuple(chains), tuple(rejections), heads)
            _report(plan, time.perf_counter() - started)
            return plan
        vetoed |= rejected  # the remaining chains may run through the adds that stay


def _report(plan: Plan, seconds: float) -> None:
    """Log a plan's verdicts by reason, and write all of them to torch's structured trace."""
    reasons = Counter(rejection.reason.value for rejection in plan.rejections)
    log.debug(
        "plan: %d sites in %d chains, %d additions rejected (%s), %.1f ms",
        len(plan.sites),
        len(plan.chains),
        len(plan.rejections),
        ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items())) or "none",
        seconds * 1e3,
    )

    def verdicts() -> str:
        chains = [[{"site": site.path, "add": site.add.name} for site in chain.sites] for chain in plan.chains]
        rejections = [
            {"add": rejection.add.name, "reason": rejection.reason.value, "message": rejection.message}
            for rejection in plan.rejections
        ]
        return json.dumps({"chains": chains, "rejections": rejections}, indent=1)

    trace_artifact("mhc_plan", verdicts, encoding="json")


def _at_edges(chain: Chain, graph: Graph, edges: BoundaryInfo, aliases: Aliases) -> Chain:
    """Return the chain with the streams that arrive and leave."""
    arrives = chain.start in edges.inputs and not aliases.writers(chain.start)
    inner = len(chain.sites) == 1 or any(link.nodes for link in chain.links[1:])
    far = edges.part or (arrives and inner)
    leaving = departures(graph, chain.sites[-1], far=far, aliases=aliases) if edges.inputs or edges.part else ()
    return replace(chain, arrives=arrives, departures=leaving)


def _goes_on(chain: Chain, edges: BoundaryInfo) -> bool:
    """Return whether other graphs are likely to continue the chain."""
    if any(site.tail for site in chain.sites):
        return True
    if chain.arrives and (chain.start in edges.arriving or all(map(edges.attached, chain.sites))):
        return True
    if not chain.departures:
        return False
    value = tensor_value(chain.start)
    return edges.part or (chain.arrives and value is not None and value.requires_grad)
