"""The graph passes: from an FX graph with residual adds to the same graph on parallel streams.

    graph ─ NORMALIZE ─> one spelling ─ find, plan_chains ─> Plan ─ ExpandStreams, OutlineRegions ─> graph with mhc:: operators
          ─ FuseSites ─> operators that have kernels (for a compiler), or ─ LowerOperators, CanonicalizeAten ─> plain ATen (for an exported program)

Where to look: a residual add is recognised in `find`, joined to its chain in `plan`, and becomes streams in `expand`; `regions` opens the regions
of activation checkpointing before all of this and closes them after it. What an operation is (a product, a view, an in-place write) is said in
`roles`, and nowhere else. Every addition that is not rewritten has a `Reason` in `verdict`.

To add a pass, write a frozen dataclass with a `name` and an `apply(graph) -> graph` (see `base.Pass`), and put it in the tuple below or, after
the plan, beside `ExpandStreams` in `expand_plan`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhc_compile.passes.analysis.provenance import ModuleRef, Provenance, source_line
from mhc_compile.passes.core.pass_base import Hook, Pass, copy_graph, run_passes
from mhc_compile.passes.planning.chains import Chain, Plan, plan_chains, reject_site
from mhc_compile.passes.planning.graph_boundary import (
    BoundaryInfo,
    BranchInput,
    BranchOutput,
    BranchTail,
    StreamInput,
    StreamOutput,
    crossings,
)
from mhc_compile.passes.planning.split_branches import BranchHead
from mhc_compile.passes.planning.verdict import Reason, Rejection, Site
from mhc_compile.passes.transforms.checkpoint_regions import InlineRegions, OutlineRegions, adopt
from mhc_compile.passes.transforms.expand_streams import ExpandStreams, RemoveDeclarations
from mhc_compile.passes.transforms.functionalize import FunctionalizeWrites
from mhc_compile.passes.transforms.fuse_sites import FuseSites
from mhc_compile.passes.transforms.lower_to_aten import CanonicalizeAten, LowerOperators, RecomposeLayerNorms
from mhc_compile.passes.transforms.normalize_adds import NormalizeAdds
from mhc_compile.passes.transforms.recompute import RecomputeSteps
from mhc_compile.passes.transforms.stream_builder import Binding, End

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.fx import Graph

__all__ = [
    "NORMALIZE",
    "Arrival",
    "Binding",
    "CanonicalizeAten",
    "Chain",
    "Closing",
    "Departure",
    "Edges",
    "End",
    "ExpandStreams",
    "FunctionalizeWrites",
    "FuseSites",
    "Head",
    "Hook",
    "InlineRegions",
    "LowerOperators",
    "ModuleRef",
    "NormalizeAdds",
    "Opening",
    "OutlineRegions",
    "Pass",
    "Plan",
    "Provenance",
    "Reason",
    "RecomposeLayerNorms",
    "RecomputeSteps",
    "Rejection",
    "RemoveDeclarations",
    "Site",
    "Tail",
    "adopt",
    "close_regions",
    "copy_graph",
    "crossings",
    "expand_plan",
    "normalize",
    "plan_chains",
    "reject_site",
    "run_passes",
    "source_line",
]

#: What runs before the sites are looked for.
NORMALIZE: tuple[Pass, ...] = (InlineRegions(), RemoveDeclarations(), FunctionalizeWrites(), NormalizeAdds())


def normalize(graph: Graph, hook: Hook | None = None) -> Graph:
    """The graph in the spelling that `plan_chains` reads."""
    return run_passes(graph, NORMALIZE, hook)


def expand_plan(
    graph: Graph,
    plan: Plan,
    bindings: Mapping[Site, Binding],
    hook: Hook | None = None,
    *,
    openings: Mapping[BranchHead, tuple[str, Binding]] | None = None,
) -> Graph:
    """The rewritten graph. `plan` was made on `graph`, and `bindings` names the parameters of each of its sites.

    `openings` gives names and parameters to those heads of the plan whose tails lie in other graphs.
    """
    return run_passes(graph, (ExpandStreams(plan, bindings, openings or {}), OutlineRegions()), hook)


def close_regions(graph: Graph, hook: Hook | None = None) -> Graph:
    """A normalised graph in which nothing is to be rewritten, with its regions as calls again."""
    return run_passes(graph, (OutlineRegions(),), hook)
