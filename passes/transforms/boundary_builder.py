"""Write the graph inputs by which streams enter a graph, and the results by which they leave."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mhc_compile.passes.analysis.op_info import known_tensor
from mhc_compile.passes.planning.graph_boundary import (
    ARRIVAL,
    DEPARTURES,
    BranchInput,
    BranchOutput,
    StreamInput,
    StreamOutput,
)
from mhc_compile.passes.transforms.stream_builder import Binding, StreamBuilder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch.fx import Graph, Node

    from mhc_compile.passes.planning.plan import BranchHead
    from mhc_compile.passes.planning.verdict import Site


class BoundaryBuilder(StreamBuilder):
    """Writes graph inputs that receive streams, and results that return them.

    `openings` are the heads of branches that end in other graphs, with the names and parameters of
    their sites.
    """

    def __init__(
        self, graph: Graph, nodes: dict[Node, Node], openings: Mapping[BranchHead, tuple[str, Binding]]
    ) -> None:
        super().__init__(graph, nodes)
        #: Heads of branches, by their trunk value, as long as they are not expanded.
        self.openings = {head.value: (head, *opening) for head, opening in openings.items()}
        #: Results to add, and the functions that describe them, given their numbers.
        self.leaving: list[tuple[tuple[Node, ...], Callable[..., StreamOutput | BranchOutput]]] = []
        #: The place of each result of the original graph.
        output = next(node for node in reversed(nodes) if node.op == "output").args[0]
        results = output if isinstance(output, (tuple, list)) else ()
        self.results: dict[Any, int] = {node: number for number, node in reversed(list(enumerate(results)))}

    def depart(self) -> None:
        """Add the streams that leave to the results of the graph."""
        if not self.leaving:
            return
        output = self.graph.output_node()
        results = list(output.args[0])  # type: ignore[arg-type]
        notes = []
        for nodes, note in self.leaving:
            notes.append(note(*range(len(results), len(results) + len(nodes))))
            results.extend(nodes)
        output.args = (tuple(results),)
        output.meta[DEPARTURES] = tuple(notes)

    def open_alone(self) -> None:
        """Expand the heads whose trunk value belongs to no chain of this graph."""
        for value, (head, name, binding) in list(self.openings.items()):
            self._open(value, self._arrive(value, head.axis, binding.streams, name))

    def _open(self, value: Node, streams: Node) -> None:
        """Let the head of a branch at `value`, if any, read streams, and return its tail's weights.

        before: h = norm2(x1); output (x1, h)
        after:  pre, post, res, _ = mhc.coefficients(S1, phi, bias, scale)
                h = norm2(mhc.collapse(S1, pre)); output (S1.mean(-2), h, S1, post, res)
        """
        if value not in self.openings:
            return
        head, name, binding = self.openings.pop(value)
        trunk, readers = self.nodes[value], [self.nodes[reader] for reader in head.readers]
        self._follow(max(min(readers).prev, streams), like=min(readers))
        collapsed, _, post, res = self._read(binding, streams)
        collapsed = self._features_back(collapsed, head.axis, trunk)
        for reader in readers:
            reader.replace_input_with(trunk, collapsed)
        entry, arrival = (str(node.target) if node.op == "placeholder" else None for node in (value, streams))
        axis = head.axis - known_tensor(value).dim()
        note = partial(BranchOutput, entry, self.results.get(value), arrival, axis=axis, name=name)
        self.leaving.append(((post, res), note))

    def _arrive(self, start: Node, axis: int, n: int, path: str) -> Node:
        """Add the graph input that receives streams, whose mean is the input `start`."""
        value = known_tensor(start)
        with torch.no_grad():
            wide = value.movedim(axis, -1).unsqueeze(-2)
            copies = wide.expand(*wide.shape[:-2], n, wide.shape[-1]).clone(memory_format=torch.contiguous_format)
        streams = self._input("streams", start, copies.requires_grad_(value.requires_grad))
        streams.meta[ARRIVAL] = StreamInput(str(streams.target), str(start.target), axis - value.dim(), n, path)
        return streams

    def _close(self, site: Site, streams: Node) -> tuple[Node, Node]:
        """Add the inputs that receive post and res of a branch that began in another graph."""
        wide, branch = known_tensor(streams), known_tensor(site.branch_outputs[0])
        tokens, n = wide.shape[:-2], wide.shape[-2]
        dtype = torch.promote_types(wide.dtype, torch.float32)
        found = []
        for kind, sizes in (("post", (n,)), ("res", (n, n))):
            with torch.no_grad():
                value = wide.new_empty((*tokens, *sizes), dtype=dtype).requires_grad_(branch.requires_grad)
            node = self._input(kind, site.trunk, value)
            axis = site.axis - (wide.dim() - 1)
            node.meta[ARRIVAL] = BranchInput(str(node.target), str(site.trunk.target), axis, n, site.name, kind)
            found.append(node)
        return found[0], found[1]
