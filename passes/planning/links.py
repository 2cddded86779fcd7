"""Links between sites: the trunk paths from sum to site, and the chains that they form."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhc_compile.passes.analysis.op_info import is_contraction
from mhc_compile.passes.lifting.trunk_op import Obstacle
from mhc_compile.passes.lifting.trunk_path import TrunkPath, trunk_path_between
from mhc_compile.passes.planning.graph_boundary import BoundaryInfo
from mhc_compile.passes.planning.plan import Chain

if TYPE_CHECKING:
    from torch.fx import Node

    from mhc_compile.passes.analysis.aliases import Aliases
    from mhc_compile.passes.planning.verdict import Site


def trunk_paths_to(
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
    source = nearest_sum(site.trunk, by_sum, aliases, edges)
    if source is None or aliases.writers(site.trunk):
        return site.trunk, None
    axis = by_sum[source].axis if source in by_sum else edges.axis(source)
    assert axis is not None
    path = trunk_path_between(source, site.trunk, axis, aliases)
    if isinstance(path, TrunkPath) and path.axes[site.trunk] != site.shortcut.axes[site.trunk]:
        return source, None
    return source, path


def nearest_sum(
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


def link_sites(sites: list[Site], trunk_paths: dict[Site, TrunkPath | None], by_sum: dict[Node, Site]) -> list[Chain]:
    """Return the chains of `sites`, given the path to each and the site of each sum."""
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
    return {
        next(site for site in group if not any(site.add in other.branch for other in group))
        for group in rivals.values()
    }
