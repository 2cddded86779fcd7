"""The plan: chains of sites, rejections, and heads of branches. Reports and the rewrite read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.fx import Node

    from mhc_compile.passes.analysis.provenance import ModuleRef
    from mhc_compile.passes.lifting.trunk_path import TrunkPath
    from mhc_compile.passes.planning.verdict import Rejection, Site


@dataclass(frozen=True, eq=False)
class Chain:
    """Sites in order, from the first to the last that share streams in this graph."""

    sites: tuple[Site, ...]
    #: For each site, the trunk operations from the previous sum to its trunk value. Those of the
    #: first are empty, unless its streams arrive from another graph.
    links: tuple[TrunkPath, ...]
    #: Whether the chain begins at a graph input whose streams are one more input.
    arrives: bool = False
    #: The paths from the last sum to each result whose streams leave as one more result.
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
class BranchHead:
    """A value that later graphs read, and its readers here: perhaps the head of a branch."""

    #: The trunk value: a graph input, or the last sum of a chain.
    value: Node
    #: The operations that read it.
    readers: tuple[Node, ...]
    #: The modules that hold the readers, in order. Their calls can declare parameters.
    modules: tuple[ModuleRef, ...]
    #: The numbers of the results that are computed from the readers, each with the module of the
    #: last product with weights on the way, if any.
    results: dict[int, ModuleRef | None]
    #: The feature axis of the value.
    axis: int


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
