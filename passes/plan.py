"""Joins sites into chains: the sites that share one set of streams. The plan is the dry run; reports and the rewrite both read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mhc_compile.passes.find import Findings, find
from mhc_compile.passes.lift import Region, region_between
from mhc_compile.passes.roles import is_contraction
from mhc_compile.passes.verdict import Reason, Refusal, Site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch.fx import Graph, Node

    from mhc_compile.passes.provenance import Provenance

__all__ = ["Chain", "Plan", "plan_chains", "refuse_site"]


@dataclass(frozen=True, eq=False)
class Chain:
    """Sites in order, from the first to the last that share streams."""

    sites: tuple[Site, ...]
    #: For each site, the trunk operations between the previous site's sum and its skip, which run on the streams. Empty for the first.
    links: tuple[Region, ...]

    @property
    def start(self) -> Node:
        """The value that the streams start as copies of."""
        return self.sites[0].skip

    @property
    def width(self) -> int:
        """C."""
        return self.sites[0].width


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that is going to be rewritten, and everything that is not, with reasons. Nodes belong to the normalised graph."""

    chains: tuple[Chain, ...]
    refusals: tuple[Refusal, ...]

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites, chain by chain."""
        return tuple(site for chain in self.chains for site in chain.sites)


def plan_chains(
    graph: Graph,
    provenance: Provenance,
    *,
    min_sites: int = 2,
    refuse: Callable[[Site], Refusal | None] | None = None,
) -> Plan:
    """Finds the sites of a normalised graph and links them.

    A site follows another where its skip is the other's sum, directly or through liftable trunk operations. Where several sites read one trunk
    value (nested blocks, forks), one of them carries the chain on and the others begin chains of their own. A chain of fewer than `min_sites` is
    left alone. `refuse` lets the caller veto sites for reasons outside the graph (see `refuse_site`).
    """
    findings = find(graph, provenance)
    vetoed = {site: refusal for site in findings.sites if refuse is not None and (refusal := refuse(site)) is not None}
    kept = [site for site in findings.sites if site not in vetoed]
    chains = _link(graph, kept)
    long = tuple(chain for chain in chains if len(chain.sites) >= min_sites)
    short = [
        _too_short(site, chain, min_sites) for chain in chains if len(chain.sites) < min_sites for site in chain.sites
    ]
    return Plan(long, _in_order(graph, findings, [*vetoed.values(), *short]))


def refuse_site(site: Site, reason: Reason, sentence: Callable[[], str]) -> Refusal:
    """A refusal in the place of a site."""
    return Refusal(site.add, reason, sentence, site.owner.path, site.adds[:-1])


def _link(graph: Graph, sites: list[Site]) -> list[Chain]:
    order = {node: position for position, node in enumerate(graph.nodes)}
    by_sum = {site.add: site for site in sites}
    regions = {site: _region(site, by_sum, order) for site in sites}
    heirs = _heirs(sites, regions, by_sum)
    chains: list[tuple[list[Site], list[Region]]] = []
    place: dict[Site, tuple[list[Site], list[Region]]] = {}
    for site in sites:
        region = regions[site]
        previous = by_sum.get(region.source) if region is not None and site in heirs else None
        if region is None or previous is None:
            chains.append(([], []))
            place[site] = chains[-1]
            region = Region.empty(site.skip, site.axis)
        else:
            place[site] = place[previous]
        members, between = place[site]
        members.append(site)
        between.append(region)
    return [Chain(tuple(members), tuple(between)) for members, between in chains]


def _heirs(sites: list[Site], regions: dict[Site, Region | None], by_sum: dict[Node, Site]) -> set[Site]:
    """The sites that carry a trunk on, where several read the same one.

    Of a block and the residual blocks nested in its branch, the outer one carries the trunk on; the inner ones have a chain of their own, which
    starts from what the outer branch reads. A long skip is no block: `x + trunk`, whose other term is the trunk itself some sites later; there
    the inner sites go on, and the long skip stands alone. Of a fork the first goes on.
    """
    rivals: dict[Node, list[Site]] = {}
    for site in sites:
        region = regions[site]
        if region is not None:
            rivals.setdefault(region.source, []).append(site)
    chosen: set[Site] = set()
    for group in rivals.values():
        blocks = [site for site in group if not all(term in by_sum for term in site.terms)] or group
        outer = [site for site in blocks if not any(site.add in other.branch for other in blocks)]
        chosen.add(outer[0])
    return chosen


def _region(site: Site, by_sum: dict[Node, Site], order: dict[Node, int]) -> Region | None:
    """What lies between the previous site's sum and this site's skip; None where streams cannot come through."""
    source = _nearest_sum(site.skip, by_sum)
    if source is None:
        return None
    return region_between(source, site.skip, by_sum[source].axis, site.axis, order)


def _nearest_sum(skip: Node, by_sum: dict[Node, Site], limit: int = 64) -> Node | None:
    """The first sum of a site that lies behind `skip`. The trunk operations between two sites are few: a longer search would find a branch."""
    queue, seen = [skip], {skip}
    while queue and len(seen) < limit:
        node = queue.pop(0)
        if node in by_sum:
            return node
        for operand in node.all_input_nodes:
            if operand not in seen and not is_contraction(operand):
                seen.add(operand)
                queue.append(operand)
    return None


def _too_short(site: Site, chain: Chain, min_sites: int) -> Refusal:
    return refuse_site(
        site,
        Reason.CHAIN_TOO_SHORT,
        lambda: (
            f"its chain has {len(chain.sites)} site{'s'[: len(chain.sites) > 1]}; min_sites={min_sites} asks for more"
        ),
    )


def _in_order(graph: Graph, findings: Findings, later: Iterable[Refusal]) -> tuple[Refusal, ...]:
    order = {node: position for position, node in enumerate(graph.nodes)}
    return tuple(sorted([*findings.refusals, *later], key=lambda refusal: order[refusal.add]))
