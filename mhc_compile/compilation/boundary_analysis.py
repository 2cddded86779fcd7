"""Find where streams and branches cross the boundary of a graph."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from mhc_compile.attachment.model_tree import find_connection
from mhc_compile.errors import AttachError
from mhc_compile.graph_breaks.split_branches import find_tail
from mhc_compile.graph_breaks.stream_registry import carried_axis
from mhc_compile.passes.analysis.op_info import tensor_value
from mhc_compile.passes.planning.graph_boundary import BoundaryInfo

if TYPE_CHECKING:
    from torch.fx import Graph

    from mhc_compile.capture.provenance import DynamoProvenance
    from mhc_compile.config.options import ResolvedOptions
    from mhc_compile.passes import Plan, Site


def analyze_boundary(graph: Graph, provenance: DynamoProvenance, inputs: list[Any]) -> BoundaryInfo:
    """Return the boundary of a graph, from its example inputs and the attached modules."""
    placeholders = zip(graph.find_nodes(op="placeholder"), inputs, strict=True)
    values = {}
    for node, value in placeholders:
        example = tensor_value(node)
        activation = example is not None and example.is_floating_point() and example.dim() > 1
        if activation and not provenance.holds_weights(node):
            values[node] = value

    def attached(site: Site) -> bool:
        owner = provenance.module(site.owner)
        return owner is not None and find_connection(owner, site) is not None

    arriving = {node: axis for node, value in values.items() if (axis := carried_axis(value)) is not None}
    tail = partial(find_tail, provenance, values)
    return BoundaryInfo(provenance.frame.is_part, frozenset(values), arriving, attached, tail)


def check_whole(plan: Plan, boundary: BoundaryInfo, options: ResolvedOptions, provenance: DynamoProvenance) -> None:
    """Check that every chain starts and ends in this graph.

    Streams that end after a graph break are read out as their mean; other read-outs need the whole
    chain in one graph.

    Raises:
        AttachError: a chain comes from another graph, or may continue in one.
    """
    root = provenance.root
    alone = root is not None and provenance.frame.runs_inside_another(root, compiled_alone=True)
    for chain in plan.chains:
        # A block compiled alone takes its trunk from outside and returns it.
        part = boundary.part or (alone and chain.arrives)
        goes_on = part and (chain.departures or any(site.tail for site in chain.sites))
        if chain.start in boundary.arriving or goes_on:
            asked = "single_pass=True" if options.single_pass else f"read_out={options.read_out!r}"
            raise AttachError(
                f"{chain.sites[0]}: its chain runs through several graphs, and {asked} needs it whole. Find the graph"
                " break (mhc explain shows the pieces; torch.compile(fullgraph=True) names it) and compile the model as"
                " a whole, or use read_out='mean', single_pass=False"
            )
