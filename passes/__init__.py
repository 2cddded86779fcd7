"""The graph passes: from an FX graph with residual adds to the same graph on parallel streams.

    graph ─ NORMALIZE ─> one spelling ─ plan_chains ─> Plan ─ expand_plan ─> graph with mhc::
    operators
          ─ FoldScales, FuseSites, FuseNorms ─> operators that have kernels (for a compiler), or
          ─ LowerOperators, CanonicalizeAten ─> plain ATen (exported programs)

`README.md` in this folder has the map, the contract of a pass, and the glossary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhc_compile.passes.core.pass_base import Hook, Pass, run_passes
from mhc_compile.passes.planning.chains import plan_chains
from mhc_compile.passes.planning.plan import Chain, Plan
from mhc_compile.passes.planning.verdict import Reason, Rejection, Site
from mhc_compile.passes.transforms.checkpoint_regions import InlineRegions
from mhc_compile.passes.transforms.expand_streams import ExpandStreams, RemoveDeclarations
from mhc_compile.passes.transforms.functionalize import FunctionalizeWrites
from mhc_compile.passes.transforms.normalize_adds import NormalizeAdds
from mhc_compile.passes.transforms.outline_regions import OutlineRegions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.fx import Graph

    from mhc_compile.passes.planning.plan import BranchHead
    from mhc_compile.passes.transforms.stream_builder import Binding

__all__ = [
    "NORMALIZE",
    "Chain",
    "Pass",
    "Plan",
    "Reason",
    "Rejection",
    "Site",
    "close_regions",
    "expand_plan",
    "normalize",
    "plan_chains",
    "run_passes",
]

#: The passes that run before sites are looked for.
NORMALIZE: tuple[Pass, ...] = (InlineRegions(), RemoveDeclarations(), FunctionalizeWrites(), NormalizeAdds())


def normalize(graph: Graph, hook: Hook | None = None) -> Graph:
    """Return the graph in the spelling that `plan_chains` reads."""
    return run_passes(graph, NORMALIZE, hook)


def expand_plan(
    graph: Graph,
    plan: Plan,
    bindings: Mapping[Site, Binding],
    hook: Hook | None = None,
    *,
    openings: Mapping[BranchHead, tuple[str, Binding]] | None = None,
) -> Graph:
    """Return the rewritten graph. `plan` belongs to `graph`, `bindings` to the sites of `plan`.

    `openings` gives names and parameters to those heads of the plan whose tails lie in other
    graphs.
    """
    return run_passes(graph, (ExpandStreams(plan, bindings, openings or {}), OutlineRegions()), hook)


def close_regions(graph: Graph, hook: Hook | None = None) -> Graph:
    """Return a normalised graph in which nothing is rewritten, with its regions as calls again."""
    return run_passes(graph, (OutlineRegions(),), hook)
