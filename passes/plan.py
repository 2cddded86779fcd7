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

    A site follows another where its skip is the other's sum, directly or through liftable trunk operations. A chain of fewer than `min_sites` is
    left alone. `refuse` lets the caller veto sites for reasons outside the graph (see `refuse_site`).
    """
    findings = find(graph, provenance)
    vetoed = {site: refusal for site in findings.sites if refuse is not None and (refusal := refuse(site)) is not None}
    kept = [site for site in findings.sites if site not in vetoed]
    chains, shared = _link(graph, kept)
    long = tuple(chain for chain in chains if len(chain.sites) >= min_sites)
    short = [
        _too_short(site, chain, min_sites) for chain in chains if len(chain.sites) < min_sites for site in chain.sites
    ]
    return Plan(long, _in_order(graph, findings, [*vetoed.values(), *shared, *short]))


def refuse_site(site: Site, reason: Reason, sentence: Callable[[], str]) -> Refusal:
    """A refusal in the place of a site."""
    return Refusal(site.add, reason, sentence, site.owner.path)


def _link(graph: Graph, sites: list[Site]) -> tuple[list[Chain], list[Refusal]]:
    order = {node: position for position, node in enumerate(graph.nodes)}
    by_sum = {site.add: site for site in sites}
    chains: list[tuple[list[Site], list[Region]]] = []
    place: dict[Site, int] = {}
    taken: dict[Node, Site] = {}
    refusals: list[Refusal] = []
    for site in sites:
        region = _region(site, by_sum, order)
        trunk = region.source
        if trunk in taken:
            refusals.append(_shared(site, taken[trunk]))
            by_sum.pop(site.add)
            continue
        taken[trunk] = site
        previous = by_sum.get(trunk)
        if previous is None:
            place[site] = len(chains)
            chains.append(([site], [region]))
        else:
            place[site] = place[previous]
            members, between = chains[place[site]]
            members.append(site)
            between.append(region)
    return [Chain(tuple(members), tuple(between)) for members, between in chains], refusals


def _region(site: Site, by_sum: dict[Node, Site], order: dict[Node, int]) -> Region:
    """What lies between the previous site's sum and this site's skip; nothing, from the skip itself, where no sum can be reached."""
    alone = Region(site.skip, (), {site.skip: site.axis})
    source = _nearest_sum(site.skip, by_sum)
    if source is None:
        return alone
    return region_between(source, site.skip, by_sum[source].axis, site.axis, order) or alone


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


def _shared(site: Site, first: Site) -> Refusal:
    return refuse_site(
        site,
        Reason.SHARED_TRUNK,
        lambda: (
            f"the trunk value '{site.skip}' already belongs to {first.path}, which lies in the branch of this add or beside it"
        ),
    )


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
