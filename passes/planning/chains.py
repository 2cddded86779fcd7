"""Plan chains: link the sites that share one set of streams."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mhc_compile._torch import trace_artifact
from mhc_compile.passes.analysis.op_info import is_contraction, tensor_value
from mhc_compile.passes.lifting.trunk_path import Obstacle, TrunkPath, trunk_path_between
from mhc_compile.passes.planning.graph_boundary import BoundaryInfo, departures
from mhc_compile.passes.planning.match_residuals import Findings, find
from mhc_compile.passes.planning.split_branches import BranchHead, find_heads
from mhc_compile.passes.planning.verdict import Reason, Rejection, Site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch.fx import Graph, Node

    from mhc_compile.passes.analysis.aliases import Aliases
    from mhc_compile.passes.analysis.provenance import Provenance

__all__ = ["Chain", "Plan", "plan_chains", "reject_site"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Chain:
    """Sites in order, from the first to the last that share streams in this graph."""

    sites: tuple[Site, ...]
    #: For each site, the trunk operations between the previous site's sum and its trunk value,
    #: which run on the streams. Those of the first are empty, unless its streams arrive from
    #: another graph.
    links: tuple[TrunkPath, ...]
    #: Whether the chain begins at a graph input whose streams arrive from another graph, as one
    #: more input.
    arrives: bool = False
    #: The paths from the last sum to each result of the graph whose streams leave as one more
    #: result.
    departures: tuple[TrunkPath, ...] = ()

    @property
    def start(self) -> Node:
        """The value whose copies the streams are at first, or whose streams arrive."""
        return self.links[0].source

    @property
    def width(self) -> int:
        """C."""
        return self.sites[0].width


@dataclass(frozen=True, eq=False)
class Plan:
    """The additions to rewrite, and those rejected. Nodes belong to the normalised graph."""

    chains: tuple[Chain, ...]
    rejections: tuple[Rejection, ...]
    #: Heads of branches whose tails may lie in other graphs.
    heads: tuple[BranchHead, ...] = ()

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites, chain by chain."""
        return tuple(site for chain in self.chains for site in chain.sites)


def plan_chains(
    graph: Graph,
    provenance: Provenance,
    *,
    min_chain_length: int = 2,
    reject: Callable[[Site], Rejection | None] | None = None,
    edges: BoundaryInfo = BoundaryInfo(),  # noqa: B008 - frozen
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
    """
    started = time.perf_counter()
    findings = find(graph, provenance, edges)
    vetoed = {
        site: rejection for site in findings.sites if reject is not None and (rejection := reject(site)) is not None
    }
    kept = [site for site in findings.sites if site not in vetoed]
    aliases = findings.aliases
    while True:
        sites = [site for site in kept if site not in vetoed]
        by_sum = {site.add: site for site in sites}
        trunk_paths, blocked = _trunk_paths(sites, by_sum, aliases, edges)
        rejected = _long_skips(sites, trunk_paths, by_sum, aliases)
        if not rejected:
            chains = [_at_edges(chain, graph, edges, aliases) for chain in _link(sites, trunk_paths, by_sum)]
            rejected = _sides(chains) or _crossings(chains)
        if not rejected:
            rejected = _short([chain for chain in chains if not _goes_on(chain, edges)], min_chain_length, blocked)
        if not rejected:
            heads = find_heads(graph, provenance, chains, edges, aliases)
            plan = Plan(tuple(chains), _in_order(findings, vetoed.values()), heads)
            _report(plan, time.perf_counter() - started)
            return plan
        vetoed |= rejected  # the remaining chains may run through the adds that stay


def reject_site(site: Site, reason: Reason, message: Callable[[], str]) -> Rejection:
    """Return the rejection of a site that was found."""
    return Rejection(site.add, reason, message, site.owner.path, site.adds[:-1])


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


def _long_skips(
    sites: list[Site], trunk_paths: dict[Site, TrunkPath | None], by_sum: dict[Node, Site], aliases: Aliases
) -> dict[Site, Rejection]:
    """Reject the sums `x + x'` of a trunk value and the same trunk some sites later.

    before: x1 = x + f(x); x2 = x1 + g(x1); y = x + x2
    after:  y is no site, and a chain through x2 goes on after it
    """
    long: dict[Site, Rejection] = {}
    for site in sites:
        last = _nearest_sum(site.branch_outputs[0], by_sum, aliases) if len(site.branch_outputs) == 1 else None
        if last is None or last is site.add:
            continue
        if isinstance(trunk_path_between(last, site.branch_outputs[0], by_sum[last].axis, aliases), Obstacle):
            continue
        if _follows(by_sum[last], site, trunk_paths, by_sum, aliases):
            long[site] = reject_site(
                site,
                Reason.LONG_SKIP,
                lambda site=site: (
                    f"'{site.skip}' is added to its own trunk some sites later, '{site.branch_outputs[0]}'"
                ),  # type: ignore[misc]
            )
    return long


def _follows(
    last: Site, site: Site, trunk_paths: dict[Site, TrunkPath | None], by_sum: dict[Node, Site], aliases: Aliases
) -> bool:
    """Return whether the trunk of `last`, followed back, passes the trunk value of `site`."""
    step: Site | None = last
    while step is not None:
        trunk_path = trunk_paths[step]
        if site.trunk is step.trunk or (trunk_path is not None and site.trunk in trunk_path.axes):
            return True
        if trunk_path is None or trunk_path.source not in by_sum:
            if aliases.order[site.trunk] >= aliases.order[step.trunk]:
                return False
            path = trunk_path_between(site.trunk, step.trunk, site.shortcut.axes[site.trunk], aliases)
            return isinstance(path, TrunkPath)
        step = by_sum[trunk_path.source]
    return False


def _sides(chains: list[Chain]) -> dict[Site, Rejection]:
    """Reject the sites that stand alone inside the branch of another site."""
    inside: dict[Node, Site] = {}
    for chain in chains:
        for site in chain.sites:
            inside.update((node, site) for node in site.branch)
    sides: dict[Site, Rejection] = {}
    for chain in chains:
        site = chain.sites[0]
        outer = inside.get(site.add)
        if len(chain.sites) == 1 and outer is not None and outer not in sides:
            sides[site] = reject_site(
                site,
                Reason.SIDE_ADD,
                lambda outer=outer: f"it stands alone inside the branch of {outer.path}, and its sum goes no further",  # type: ignore[misc]
            )
    return sides


def _crossings(chains: list[Chain]) -> dict[Site, Rejection]:
    """Reject the sites whose shortcut runs through trunk operations of another chain.

    before: y = norm(x); z = y + f(y); out = y + g(x)
    after:  x -> norm -> y belongs to the chain through z, and `out` stays an addition
    """
    carried = {node: chain for chain in chains for link in chain.links for node in link.nodes}
    crossed: dict[Site, Rejection] = {}
    for chain in chains:
        for site in chain.sites:
            through = [node for node in site.shortcut.nodes if carried.get(node, chain) is not chain]
            if through:
                crossed[site] = reject_site(
                    site,
                    Reason.SIDE_ADD,
                    lambda node=through[0]: (
                        f"its skip runs through '{node}', which the chain of {carried[node].sites[0].path} carries on"
                    ),  # type: ignore[misc]
                )
    return crossed


def _short(chains: list[Chain], min_chain_length: int, blocked: dict[Site, Obstacle]) -> dict[Site, Rejection]:
    def too_short(site: Site, size: int) -> Rejection:
        why = f". It ends because {blocked[site]}" if site in blocked else ""
        return reject_site(
            site,
            Reason.CHAIN_TOO_SHORT,
            lambda: (
                f"its chain has {size} site{'s'[: size > 1]}; min_chain_length={min_chain_length} asks for more{why}"
            ),
        )

    short = [chain for chain in chains if len(chain.sites) < min_chain_length]
    return {site: too_short(site, len(chain.sites)) for chain in short for site in chain.sites}


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


def _link(sites: list[Site], trunk_paths: dict[Site, TrunkPath | None], by_sum: dict[Node, Site]) -> list[Chain]:
    heirs = _heirs(sites, trunk_paths)
    chains: list[tuple[list[Site], list[TrunkPath]]] = []
    place: dict[Site, tuple[list[Site], list[TrunkPath]]] = {}
    for site in sites:
        trunk_path = trunk_paths[site]
        previous = by_sum.get(trunk_path.source) if trunk_path is not None and site in heirs else None
        if trunk_path is None or previous is None:
            chains.append(([], []))
            place[site] = chains[-1]
            if trunk_path is None or site not in heirs or trunk_path.source in by_sum:
                trunk_path = TrunkPath.empty(site.trunk, site.shortcut.axes[site.trunk])
        else:
            place[site] = place[previous]
        members, between = place[site]
        members.append(site)
        between.append(trunk_path)
    return [Chain(tuple(members), tuple(between)) for members, between in chains]


def _heirs(sites: list[Site], trunk_paths: dict[Site, TrunkPath | None]) -> set[Site]:
    """Return the sites that continue a trunk, one of those that read the same trunk value.

    Of a block and the residual blocks nested in its branch, the outer one continues the trunk; the
    inner ones have their own chain, which starts from what the outer branch reads. Of a fork the
    first continues.
    """
    rivals: dict[Node, list[Site]] = {}
    for site in sites:
        trunk_path = trunk_paths[site]
        if trunk_path is not None:
            rivals.setdefault(trunk_path.source, []).append(site)
    chosen: set[Site] = set()
    for group in rivals.values():
        outer = [site for site in group if not any(site.add in other.branch for other in group)]
        chosen.add(outer[0])
    return chosen


def _trunk_paths(
    sites: list[Site], by_sum: dict[Node, Site], aliases: Aliases, edges: BoundaryInfo
) -> tuple[dict[Site, TrunkPath | None], dict[Site, Obstacle]]:
    """Return the path to each site, None if streams cannot reach it, and unexpected obstacles.

    An obstacle is listed for the site before it too, if there is one: both chains may be too short
    because of it.
    """
    paths: dict[Site, TrunkPath | None] = {}
    blocked: dict[Site, Obstacle] = {}
    for site in sites:
        source, path = _trunk_path(site, by_sum, aliases, edges)
        paths[site] = path if isinstance(path, TrunkPath) else None
        if isinstance(path, Obstacle) and path.unexpected:
            blocked[site] = path
            if source in by_sum:
                blocked[by_sum[source]] = path
    return paths, blocked


def _trunk_path(
    site: Site, by_sum: dict[Node, Site], aliases: Aliases, edges: BoundaryInfo
) -> tuple[Node, TrunkPath | Obstacle | None]:
    """Return the previous sum, or input with streams, and the path from it to the site's trunk."""
    source = _nearest_sum(site.trunk, by_sum, aliases, edges)
    if source is None or aliases.writers(site.trunk):
        return site.trunk, None
    axis = by_sum[source].axis if source in by_sum else edges.axis(source)
    assert axis is not None
    path = trunk_path_between(source, site.trunk, axis, aliases)
    if isinstance(path, TrunkPath) and path.axes[site.trunk] != site.shortcut.axes[site.trunk]:
        return source, None
    return source, path


def _nearest_sum(
    trunk: Node,
    by_sum: dict[Node, Site],
    aliases: Aliases,
    edges: BoundaryInfo = BoundaryInfo(),  # noqa: B008 - frozen
    limit: int = 64,
) -> Node | None:
    """Return the last sum, or input with streams, from which trunk operations lead to `trunk`.

    The trunk operations between two sites are few: a longer search would find a branch.
    """
    queue, seen, found = [trunk], {trunk}, []
    while queue and len(seen) < limit:
        node = queue.pop(0)
        if node in by_sum or node in edges.arriving:
            found.append(node)
            continue
        for operand in node.all_input_nodes:
            if operand not in seen and not is_contraction(operand):
                seen.add(operand)
                queue.append(operand)
    return max(found, key=aliases.order.__getitem__, default=None)


def _in_order(findings: Findings, later: Iterable[Rejection]) -> tuple[Rejection, ...]:
    order = findings.aliases.order
    return tuple(sorted([*findings.rejections, *later], key=lambda rejection: order[rejection.add]))
