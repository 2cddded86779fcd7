"""Put the operations of activation-checkpointed regions back into bodies, after the rewrite.

`checkpoint_regions` opened them; every operation of the model still has its place, and new nodes
get one here.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

from torch import fx, nn
from torch.fx import Graph, Node

from mhc_compile._torch import copy_node, new_graph_like
from mhc_compile.passes.analysis.op_info import example_value, is_inplace, is_view, op_name
from mhc_compile.passes.core.pass_base import Pass
from mhc_compile.passes.transforms.checkpoint_regions import FIXED, PLACE, Region, attribute_of, with_attributes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: The metadata of a value that the placeholder of a body takes over.
_SHARED = frozenset({"example_value", "val", "nn_module_stack", "stack_trace"})
#: The operations of a mean of streams.
_READ_OUT = frozenset({"mean", "movedim", "contiguous", "clone"})


@dataclass(frozen=True)
class OutlineRegions(Pass):
    """Put the operations of every region into a body again.

    before: h = linear(x, weight); S1 = mhc.update(S0, h, post, res)         (each with its place)
    after:  body = self.wrap_body_0
            out = tag_activation_checkpoint(body, S0, weight, phi, bias, scale); S1 = out[0]

    Streams enter a region and streams leave it; only they are saved between two regions for the
    backward. A mean of streams that is read outside, where the streams themselves are needed too,
    is computed outside: nothing more is saved, and nothing is computed twice.
    """

    name: ClassVar[str] = "outline-regions"

    def apply(self, graph: Graph) -> Graph:
        """Return a copy of `graph` whose regions are calls, or the graph itself if it has none."""
        layout = next((node.meta[PLACE].layout for node in graph.nodes if PLACE in node.meta), None)
        if layout is None:
            return graph
        return _Outliner(graph, layout).run()


def adopt(module: nn.Module, graph: Graph) -> None:
    """Give `module` the bodies that `graph` calls, before it becomes the graph of that module."""
    for node in graph.nodes:
        if _holds_module(node):
            setattr(module, str(node.target), attribute_of(node))


class _Places:
    """A place for every node of a flat graph. The model's operations keep theirs.

    A new node may lie no earlier than its operands and no later than its readers; within these
    bounds it gets the place it prefers. If that is too late (the coefficients of a site whose
    branch begins before the region that holds its add), it gets the latest permitted place that
    lies in no region except those around the preferred one. A new node without a preference stays
    where it was written.
    """

    def __init__(self, graph: Graph, layout: Sequence[Region | None]) -> None:
        self.graph = graph
        self.layout = layout
        self.of: dict[Node, int] = {}
        self.new = [node for node in graph.nodes if FIXED not in node.meta]
        self._settle()
        self._leave()

    def region(self, node: Node) -> Region | None:
        """Return the innermost region that holds `node`."""
        return self.layout[self.of[node]]

    def _settle(self) -> None:
        earliest: dict[Node, int] = {}
        preferred: dict[Node, int] = {}
        here = 0
        for node in self.graph.nodes:
            place = node.meta[PLACE].index if PLACE in node.meta else here
            if FIXED in node.meta:
                self.of[node] = earliest[node] = here = place
            else:
                earliest[node] = max((earliest[operand] for operand in node.all_input_nodes), default=0)
                # A parameter stays with its module, and regions take it as an argument.
                preferred[node] = 0 if node.op == "get_attr" else place
            written = node.args[0] if is_inplace(node) and node.args else None
            while isinstance(written, Node):  # later readers read what this operation wrote
                earliest[written] = max(earliest[written], earliest[node])
                written = written.args[0] if is_view(written) and written.args else None
        for node in reversed(self.new):
            latest = min((self.of[user] for user in node.users), default=max(preferred[node], earliest[node]))
            self.of[node] = self._nearest(preferred[node], earliest[node], latest)
        # only tensors cross the boundary of a region: parts of a tuple stay with it
        for node in self.new:
            if node.target is operator.getitem:
                self.of[node] = self.of[node.args[0]]

    def _nearest(self, preferred: int, earliest: int, latest: int) -> int:
        if preferred <= latest:
            return max(preferred, earliest)
        home = self.layout[preferred]
        permitted = range(latest, earliest - 1, -1)
        around = (i for i in permitted if self.layout[i] is None or (home is not None and home.lies_in(self.layout[i])))
        return next(around, latest)

    def _leave(self) -> None:
        """Move read-outs at the end of a region out of it, if that saves nothing more."""
        leaving = {
            node for node in self.new if op_name(node) in _READ_OUT and node.users and self.region(node) is not None
        }
        while stay := {node for node in leaving if not self._may_leave(node, leaving)}:
            leaving -= stay
        for node in leaving:
            home = self.region(node)
            assert home is not None
            self.of[node] = next(i for i in range(self.of[node], len(self.layout)) if self.layout[i] is home.parent)

    def _may_leave(self, node: Node, leaving: set[Node]) -> bool:
        """Return whether all readers are outside, and operands are, or have other readers there."""
        home = self.region(node)

        def outside(other: Node) -> bool:
            region = self.region(other)
            return other in leaving or region is None or not region.lies_in(home)

        def crosses(operand: Node) -> bool:
            return outside(operand) or any(outside(user) and user not in leaving for user in operand.users)

        return all(map(outside, node.users)) and all(map(crosses, node.all_input_nodes))


class _Outliner:
    def __init__(self, graph: Graph, layout: Sequence[Region | None]) -> None:
        self.source = graph
        self.places = _Places(graph, layout)

    def run(self) -> Graph:
        copy = new_graph_like(self.source)
        bodies: dict[str, Any] = {}
        self._write(copy, sorted(self.source.nodes, key=self.places.of.__getitem__), None, {}, bodies)
        copy.owning_module = with_attributes(self.source.owning_module, bodies)
        return copy

    def _write(
        self,
        graph: Graph,
        nodes: Sequence[Node],
        region: Region | None,
        written: dict[Node, Node],
        bodies: dict[str, Any],
    ) -> None:
        """Write the `nodes` of `region` to `graph`, those of a region inside it as a call."""
        for inner, members in groupby(nodes, lambda node: self._child(node, region)):
            if inner is not None:  # a region's places are consecutive, and so are its nodes
                self._close(graph, list(members), inner, written, bodies)
                continue
            for node in members:
                written[node] = copy_node(graph, node, written)
                written[node].meta = _clean(node.meta)

    def _child(self, node: Node, region: Region | None) -> Region | None:
        """Return the region directly below `region` that holds `node`, or None."""
        inner = self.places.region(node)
        while inner is not region and inner is not None and inner.parent is not region:
            inner = inner.parent
        return None if inner is region else inner

    def _close(
        self, graph: Graph, members: Sequence[Node], region: Region, written: dict[Node, Node], bodies: dict[str, Any]
    ) -> None:
        inside = set(members)
        operands = dict.fromkeys(
            operand for node in members for operand in node.all_input_nodes if operand not in inside
        )
        results = [node for node in members if any(user not in inside for user in node.users)]
        body = new_graph_like(self.source, codegen=False)
        within: dict[Node, Node] = {}
        for operand in operands:
            if _holds_module(operand):  # a graph is no argument: the body has it as an attribute
                within[operand] = copy_node(body, operand, {})
            else:
                within[operand] = body.placeholder(operand.name)
            within[operand].meta = {key: value for key, value in operand.meta.items() if key in _SHARED}
        attributes: dict[str, Any] = {}
        self._write(body, members, region, within, attributes)
        body.output(tuple(within[node] for node in results)).meta = _clean(region.body.graph.output_node().meta)
        for node in (*members, *operands):
            if node.op in {"get_attr", "call_module"} and node in within:
                attributes[str(node.target)] = attribute_of(node)
        module = fx.GraphModule(attributes, body, type(region.body).__name__)
        module.meta.update(region.body.meta)  # the policy of selective checkpointing is here

        origin = region.call.args[0]
        assert isinstance(origin, Node)
        taken = {
            str(node.target) for node in self.source.nodes if node.op in {"get_attr", "call_module"}
        } | bodies.keys()
        base = str(origin.target).replace(".", "_")
        name = next(name for name in (base, *(f"{base}_{i}" for i in range(1, len(taken) + 1))) if name not in taken)
        bodies[name] = module
        holder = graph.create_node("get_attr", name, name=origin.name)
        holder.meta = _clean(origin.meta)
        arguments = (holder, *(written[operand] for operand in operands if not _holds_module(operand)))
        assert callable(region.call.target)
        call = graph.call_function(region.call.target, arguments, dict(region.call.kwargs), name=region.call.name)
        call.meta = {**_clean(region.call.meta), "example_value": tuple(example_value(node) for node in results)}
        for index, node in enumerate(results):
            written[node] = graph.create_node("call_function", operator.getitem, (call, index), name=node.name)
            written[node].meta = _clean(node.meta)


def _holds_module(node: Node) -> bool:
    return node.op == "get_attr" and isinstance(attribute_of(node), nn.Module)


def _clean(meta: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in meta.items() if key not in {PLACE, FIXED}}
