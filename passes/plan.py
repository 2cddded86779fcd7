"""Joins sites into chains: the sites that share one set of streams. The plan is the dry run; reports and the rewrite both read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mhc_compile.passes.find import Findings, find
from mhc_compile.passes.lift import liftable
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
    #: For each site, the trunk operations between the previous site's add (the chain's start, for the first) and its skip: lifted over streams.
    links: tuple[tuple[Node, ...], ...]

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
    chains, shared = _link(kept)
    long = tuple(chain for chain in chains if len(chain.sites) >= min_sites)
    short = [
        _too_short(site, chain, min_sites) for chain in chains if len(chain.sites) < min_sites for site in chain.sites
    ]
    return Plan(long, _in_order(graph, findings, [*vetoed.values(), *shared, *short]))


def refuse_site(site: Site, reason: Reason, sentence: Callable[[], str]) -> Refusal:
    """A refusal in the place of a site."""
    return Refusal(site.add, reason, sentence, site.owner.path)


def _link(sites: list[Site]) -> tuple[list[Chain], list[Refusal]]:
    by_sum = {site.add: site for site in sites}
    chains: list[tuple[list[Site], list[tuple[Node, ...]]]] = []
    place: dict[Site, int] = {}
    taken: dict[Node, Site] = {}
    refusals: list[Refusal] = []
    for site in sites:
        trunk, links = _trunk(site.skip, by_sum)
        if trunk in taken:
            refusals.append(_shared(site, taken[trunk]))
            by_sum.pop(site.add)
            continue
        taken[trunk] = site
        previous = by_sum.get(trunk)
        if previous is None:
            place[site] = len(chains)
            chains.append(([site], [()]))
        else:
            place[site] = place[previous]
            members, between = chains[place[site]]
            members.append(site)
            between.append(links)
    return [Chain(tuple(members), tuple(between)) for members, between in chains], refusals


def _trunk(skip: Node, by_sum: dict[Node, Site]) -> tuple[Node, tuple[Node, ...]]:
    """The sum that `skip` is, or views, and the operations between; `skip` itself where the walk meets no sum."""
    links: list[Node] = []
    node = skip
    while node not in by_sum:
        if not liftable(node):
            return skip, ()
        links.append(node)
        node = node.all_input_nodes[0]
    return node, tuple(reversed(links))


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
