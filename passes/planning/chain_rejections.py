"""Sites that are rejected because of the chains around them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from mhc_compile.passes.analysis.op_info import runs_once
from mhc_compile.passes.lifting.trunk_op import Obstacle
from mhc_compile.passes.lifting.trunk_path import TrunkPath, trunk_path_between
from mhc_compile.passes.planning.links import nearest_sum
from mhc_compile.passes.planning.verdict import Reason, Rejection, Site

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.fx import Node

    from mhc_compile.passes.analysis.aliases import Aliases
    from mhc_compile.passes.planning.plan import Chain


def reject_site(site: Site, reason: Reason, message: Callable[[], str]) -> Rejection:
    """Return the rejection of a site that was found."""
    return Rejection(site.add, reason, message, site.owner.path, site.adds[:-1])


def long_skips(
    sites: list[Site], trunk_paths: dict[Site, TrunkPath | None], by_sum: dict[Node, Site], aliases: Aliases
) -> dict[Site, Rejection]:
    """Reject the sums `x + x'` of a trunk value and the same trunk some sites later.

    before: x1 = x + f(x); x2 = x1 + g(x1); y = x + x2
    after:  y is no site, and a chain through x2 goes on after it
    """
    long: dict[Site, Rejection] = {}
    for site in sites:
        output = site.branch_outputs[0]
        last = nearest_sum(output, by_sum, aliases) if len(site.branch_outputs) == 1 else None
        if last is None or last is site.add:
            continue
        if isinstance(trunk_path_between(last, output, by_sum[last].axis, aliases), Obstacle):
            continue
        if _follows(by_sum[last], site, trunk_paths, by_sum, aliases):
            message = "'{}' is added to its own trunk some sites later, '{}'".format
            long[site] = reject_site(site, Reason.LONG_SKIP, partial(message, site.skip, output))
    return long


def _follows(
    last: Site, site: Site, trunk_paths: dict[Site, TrunkPath | None], by_sum: dict[Node, Site], aliases: Aliases
) -> bool:
    """Return whether the trunk of `last`, followed back, passes the trunk value of `site`."""
    step = last
    while True:
        trunk_path = trunk_paths[step]
        if site.trunk is step.trunk or (trunk_path is not None and site.trunk in trunk_path.axes):
            return True
        if trunk_path is None or trunk_path.source not in by_sum:
            if aliases.order[site.trunk] >= aliases.order[step.trunk]:
                return False
            path = trunk_path_between(site.trunk, step.trunk, site.shortcut.axes[site.trunk], aliases)
            return isinstance(path, TrunkPath)
        step = by_sum[trunk_path.source]


def side_adds(chains: list[Chain]) -> dict[Site, Rejection]:
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
            message = "it stands alone inside the branch of {0.path}, and its sum goes no further".format
            sides[site] = reject_site(site, Reason.SIDE_ADD, partial(message, outer))
    return sides


def crossed_shortcuts(chains: list[Chain]) -> dict[Site, Rejection]:
    """Reject the sites whose shortcut runs through trunk operations of another chain.

    before: y = norm(x); z = y + f(y); out = y + g(x)
    after:  x -> norm -> y belongs to the chain through z, and `out` stays an addition

    Two shortcuts may share an operation, which then runs on the streams of each, unless it must run
    once: because it draws random numbers or keeps statistics.

    before: y = dropout(x); z = y + f(x); out = y + g(x)
    after:  y belongs to the chain through z, and `out` stays an addition
    """
    carried = {node: chain for chain in chains for link in chain.links for node in link.nodes}
    for chain in chains:
        for node in (node for site in chain.sites for node in site.shortcut.nodes if runs_once(node)):
            carried.setdefault(node, chain)
    crossed: dict[Site, Rejection] = {}
    for chain in chains:
        for site in chain.sites:
            through = [node for node in site.shortcut.nodes if carried.get(node, chain) is not chain]
            if through:
                message = "its skip runs through '{}', which the chain of {.path} carries on".format
                other = carried[through[0]].sites[0]
                crossed[site] = reject_site(site, Reason.SIDE_ADD, partial(message, through[0], other))
    return crossed


def short_chains(chains: list[Chain], min_chain_length: int, blocked: dict[Site, Obstacle]) -> dict[Site, Rejection]:
    """Reject the sites of chains that are shorter than `min_chain_length`."""

    def too_short(site: Site, size: int) -> Rejection:
        why = f". It ends because {blocked[site]}" if site in blocked else ""
        message = "its chain has {} site{}; min_chain_length={} asks for more{}".format
        return reject_site(site, Reason.CHAIN_TOO_SHORT, partial(message, size, "s"[: size > 1], min_chain_length, why))

    short = [chain for chain in chains if len(chain.sites) < min_chain_length]
    return {site: too_short(site, len(chain.sites)) for chain in short for site in chain.sites}
