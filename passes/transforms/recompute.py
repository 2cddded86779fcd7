"""Choose the streams that are saved for the backward; the others are recomputed."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch.utils.checkpoint import CheckpointPolicy

from mhc_compile.passes.analysis.op_info import tensor_value
from mhc_compile.passes.core.pass_base import Pass, copy_graph
from mhc_compile.passes.transforms.fuse_sites import STEPS

if TYPE_CHECKING:
    from torch.fx import Graph, Node


def block_length(sites: int, streams: int) -> int:
    """Return how many sites share saved streams: `sqrt(n L / (n + 2))`, rounded, at least 1.

    Source: arXiv 2512.24880 v2, section 4.3: it minimises the memory saved for all blocks plus that
        of recomputing one.
    """
    return max(1, round(math.sqrt(streams * sites / (streams + 2))))


@dataclass(frozen=True)
class RecomputeSteps(Pass):
    """Mark fused steps to be recomputed in the backward, except the first of every block.

    before: S1, h1, ... = mhc.step(X, y, ...); S2, h2, ... = mhc.step(S1, y1, ...)
            S3, h3, ... = mhc.step(S2, y2, ...)
    after:  the same; where blocks have two sites, CheckpointPolicy.MUST_RECOMPUTE marks the second

    The same for `mhc.shifted_step` and `mhc.mix_read`. AOTAutograd's partitioner reads the marks.
    It saves the branch outputs, which a step needs, and recomputes no branch. Only steps of one
    chain are marked; streams that a trunk operation has changed are saved.
    """

    name: ClassVar[str] = "recompute-steps"

    def apply(self, graph: Graph) -> Graph:
        """Return a copy of `graph` with marks, or the graph itself where no chain has two steps."""
        if not any(len(chain) > 1 for chain in _chains(graph)):
            return graph
        copy, _ = copy_graph(graph)
        block = 0
        for chain in _chains(copy):
            length = block_length(len(chain) + 1, _streams(chain[0]))
            for index, step in enumerate(chain):
                if index % length == 0:
                    block += 1
                    continue
                mark = {"recompute": CheckpointPolicy.MUST_RECOMPUTE, "ac_graph_id": block}
                for node in (step, *step.users):
                    node.meta.update(mark)
        return copy


def _streams(step: Node) -> int:
    """Return n, of the weights post [..., n]."""
    post = tensor_value(step.args[2])  # type: ignore[arg-type]
    return post.shape[-1] if post is not None else 4


def _chains(graph: Graph) -> list[list[Node]]:
    """Return the steps of every chain: each reads the streams that the previous one writes.

    A step whose streams are not read ends a chain, as `mhc.close` does, and is none of them.
    """
    chains: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        if node.target in STEPS and any(user.args[1] == 0 for user in node.users):
            streams: Any = node.args[0]
            first = streams.target is operator.getitem and streams.args[1] == 0
            chains[node] = [*chains.pop(streams.args[0] if first else node, []), node]
    return list(chains.values())
