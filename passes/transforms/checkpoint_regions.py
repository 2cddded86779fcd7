"""Activation checkpointing: opens the regions that it makes in a graph, and closes them again.

Under Dynamo, `torch.utils.checkpoint` puts the operations of a block into a graph of their own, the body of a `tag_activation_checkpoint`. The
passes between `InlineRegions` and `OutlineRegions` see one flat graph, so that chains run through regions as if they were not there.

In the flat graph every operation of the model has a place, the number of its stretch:

    x = embed()                      0  outside
    ├ h = f(x); y = x + h            1  first region
    │                                2  outside, and empty
    ├ g = f(y); z = y + g            3  second region
    out = norm(z)                    4  outside

A region that lies in another one has stretches of its own in the middle of the outer one's. Nodes that later passes write inherit the place of the
node that they stand for as a wish, and get it as far as the flow of data permits (`_settle`). Operations of the model never change their order:
what draws random numbers, writes in place or switches autocast stays where it is.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx, nn
from torch.fx import Graph, Node

from mhc_compile.passes.analysis.op_info import is_inplace, is_view, op_name
from mhc_compile.passes.core.pass_base import Pass

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["InlineRegions", "OutlineRegions", "adopt"]

#: The key of `Node.meta` under which a node's place is, between the two passes. New nodes inherit it (see `splice.PROVENANCE`).
_PLACE = "mhc_region"
#: True on the nodes that were there when the regions were opened, and not inherited.
_FIXED = "mhc_fixed"
#: What a placeholder of a body says of the value that it receives.
_SHARED = frozenset({"example_value", "val", "nn_module_stack", "stack_trace"})
#: What a mean of streams is made of.
_READ_OUT = frozenset({"mean", "movedim", "contiguous", "clone"})
_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


@dataclass(frozen=True, eq=False)
class _Region:
    """One call of a body, with everything that is needed to write the call again."""

    call: Node
    body: fx.GraphModule
    parent: _Region | None

    def lies_in(self, other: _Region | None) -> bool:
        """Whether this is `other`, or lies in it. Everything lies in None, the outermost graph."""
        return other is None or self is other or (self.parent is not None and self.parent.lies_in(other))


@dataclass(frozen=True)
class _Place:
    """A stretch of the flat graph: `layout[index]` is the region that it belongs to, None outside of all."""

    index: int
    layout: list[_Region | None] = field(repr=False, compare=False)


@dataclass(frozen=True)
class InlineRegions(Pass):
    """Writes the operations of checkpointed regions into the graph that calls them.

    before: body = self.wrap_body_0; out = tag_activation_checkpoint(body, x, weight); y = out[0]
    after:  h = linear(x, weight); y = x + h                                 (each with its place)

    Other regions (`cond`, `invoke_subgraph`) stay calls, and so does a checkpoint whose call is not of the form above. Placeholders of a body
    become the arguments of its call. A body that is called twice is written twice.
    """

    name: ClassVar[str] = "inline-regions"

    def apply(self, graph: Graph) -> Graph:
        """A flat copy of `graph`; the same graph if it has no region that can be opened."""
        if not any(_body(node) is not None for node in graph.nodes):
            return graph
        return _Inliner(graph).run()


@dataclass(frozen=True)
class OutlineRegions(Pass):
    """Puts the operations of every region into a body again; the values that cross its boundary are found anew.

    before: h = linear(x, weight); S1 = mhc.update(S0, h, post, res)         (each with its place)
    after:  body = self.wrap_body_0; out = tag_activation_checkpoint(body, S0, weight, phi, bias, scale); S1 = out[0]

    So streams enter a region and streams leave it, and they are all that is kept between two regions for the backward. A mean of streams that is
    read outside, where the streams themselves are needed as well, is computed outside: nothing more is kept, and nothing computed twice.
    """

    name: ClassVar[str] = "outline-regions"

    def apply(self, graph: Graph) -> Graph:
        """A copy of `graph` whose regions are calls; the same graph if it has none."""
        layout = next((node.meta[_PLACE].layout for node in graph.nodes if _PLACE in node.meta), None)
        if layout is None:
            return graph
        return _Outliner(graph, layout).run()


def adopt(module: nn.Module, graph: Graph) -> None:
    """Gives `module` the bodies that `graph` calls, before it becomes the graph of that module."""
    for node in graph.nodes:
        if _holds_module(node):
            setattr(module, str(node.target), _attribute(node))


# --- opening ---------------------------------------------------------------------------------------------------------------------------


def _body(call: Node) -> fx.GraphModule | None:
    """The body of a checkpointed region, None for every other node and for calls of an unknown form."""
    if call.target is not _CHECKPOINT or not call.args or not isinstance(call.args[0], Node):
        return None
    body = _attribute(call.args[0])
    if not isinstance(body, fx.GraphModule):
        return None
    results = body.graph.output_node().args[0]
    plain = (
        isinstance(results, (tuple, list))
        and all(isinstance(result, Node) for result in results)
        and all(user.target is operator.getitem and isinstance(user.args[1], int) for user in call.users)
        and len(body.graph.find_nodes(op="placeholder")) == len(call.args) - 1
        and not any(isinstance(value, Node) for value in call.kwargs.values())
    )
    return body if plain else None


def _attribute(node: Node) -> Any:
    """What a `get_attr` or `call_module` node names."""
    value: Any = node.graph.owning_module if node.op in {"get_attr", "call_module"} else None
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value


class _Inliner:
    def __init__(self, graph: Graph) -> None:
        self.source = graph
        self.copy = Graph(tracer_cls=graph._tracer_cls)
        self.layout: list[_Region | None] = [None]
        #: Attributes of bodies that become attributes of the module round the flat graph.
        self.attributes: dict[str, Any] = {}

    def run(self) -> Graph:
        self.copy._codegen = self.source._codegen
        result = self._write(self.source, None, {})
        output = self.copy.output(result)
        output.meta = {**self.source.output_node().meta, _PLACE: self._here(), _FIXED: True}
        self.copy.owning_module = _with_attributes(self.source.owning_module, self.attributes)
        return self.copy

    def _here(self) -> _Place:
        return _Place(len(self.layout) - 1, self.layout)

    def _write(self, graph: Graph, region: _Region | None, nodes: dict[Node, Node]) -> Any:
        """Copies `graph`, whose nodes in `nodes` are given; returns what stands for its result."""
        opened: dict[Node, Sequence[Node]] = {}
        bodies = {node.args[0] for node in graph.nodes if _body(node) is not None}
        for node in graph.nodes:
            body = _body(node)
            if node in nodes or (node in bodies and all(_body(user) is not None for user in node.users)):
                continue
            if node.op == "output":
                return fx.map_arg(node.args[0], lambda operand: nodes[operand])
            if body is not None:
                opened[node] = self._open(_Region(node, body, region), [nodes[operand] for operand in node.args[1:]])
            elif node.target is operator.getitem and node.args[0] in opened:
                nodes[node] = opened[node.args[0]][node.args[1]]
            else:
                nodes[node] = self._copy(node, region, nodes)
        raise AssertionError("a graph without output")

    def _open(self, region: _Region, arguments: Sequence[Node]) -> Sequence[Node]:
        placeholders = region.body.graph.find_nodes(op="placeholder")
        self.layout.append(region)
        results: Sequence[Node] = self._write(
            region.body.graph, region, dict(zip(placeholders, arguments, strict=True))
        )
        self.layout.append(region.parent)
        return results

    def _copy(self, node: Node, region: _Region | None, nodes: Mapping[Node, Node]) -> Node:
        twin = _copy_node(self.copy, node, nodes)
        twin.meta.update({_PLACE: self._here(), _FIXED: True})
        if region is not None and node.op in {"get_attr", "call_module"}:
            twin.target = self._keep(str(node.target), _attribute(node))
        return twin

    def _keep(self, name: str, value: Any) -> str:
        """The name under which an attribute of a body goes on."""
        base, number = name.replace(".", "_"), 0
        name = base
        while (known := self.attributes.get(name, getattr(self.source.owning_module, name, None))) is not value:
            if known is None:
                self.attributes[name] = value
                break
            number += 1
            name = f"{base}_{number}"
        return name


def _copy_node(graph: Graph, node: Node, nodes: Mapping[Node, Node]) -> Node:
    twin = graph.node_copy(node, lambda operand: nodes[operand])
    if hasattr(node, "_dynamo_source"):  # see `copy_graph`
        twin._dynamo_source = node._dynamo_source
    return twin


def _with_attributes(owner: nn.Module | None, attributes: Mapping[str, Any]) -> Any:
    """A module with the attributes of `owner` and some more. `owner` itself belongs to somebody else and stays as it is."""
    if not attributes:
        return owner
    twin = nn.Module()
    for name, value in (owner.__dict__ if owner is not None else {}).items():
        twin.__dict__[name] = dict(value) if name in {"_modules", "_parameters", "_buffers"} else value
    for name, value in attributes.items():
        setattr(twin, name, value)
    return twin


# --- closing ---------------------------------------------------------------------------------------------------------------------------


class _Places:
    """A place for every node of a flat graph, such that no value flows backwards. Operations of the model keep theirs.

    A new node may lie no earlier than what it reads and no later than its readers; in between its wish is granted. Where the wish is too late
    (the coefficients of a site whose branch begins before the region that holds its add), it goes to the latest permitted place that lies in no
    region but those round the one it wished for. A new node without a wish wants to stay where it was written.
    """

    def __init__(self, graph: Graph, layout: Sequence[_Region | None]) -> None:
        self.graph = graph
        self.layout = layout
        self.of: dict[Node, int] = {}
        self.new = [node for node in graph.nodes if _FIXED not in node.meta]
        self._settle()
        self._leave()

    def region(self, node: Node) -> _Region | None:
        """The innermost region that holds `node`."""
        return self.layout[self.of[node]]

    def _settle(self) -> None:
        earliest: dict[Node, int] = {}
        wishes: dict[Node, int] = {}
        here = 0
        for node in self.graph.nodes:
            place = node.meta[_PLACE].index if _PLACE in node.meta else here
            if _FIXED in node.meta:
                self.of[node] = earliest[node] = here = place
            else:
                earliest[node] = max((earliest[operand] for operand in node.all_input_nodes), default=0)
                # A parameter stays with its module, and regions take it as an argument.
                wishes[node] = 0 if node.op == "get_attr" else place
            written = node.args[0] if is_inplace(node) and node.args else None
            while isinstance(written, Node):  # who reads it from now on, reads what this operation wrote
                earliest[written] = max(earliest[written], earliest[node])
                written = written.args[0] if is_view(written) and written.args else None
        for node in reversed(self.new):
            latest = min((self.of[user] for user in node.users), default=max(wishes[node], earliest[node]))
            self.of[node] = self._nearest(wishes[node], earliest[node], latest)
        for node in self.new:  # only tensors cross the boundary of a region: the parts of a tuple stay with it
            if node.target is operator.getitem:
                self.of[node] = self.of[node.args[0]]

    def _nearest(self, wished: int, earliest: int, latest: int) -> int:
        if wished <= latest:
            return max(wished, earliest)
        home = self.layout[wished]
        permitted = range(latest, earliest - 1, -1)
        around = (i for i in permitted if self.layout[i] is None or (home is not None and home.lies_in(self.layout[i])))
        return next(around, latest)

    def _leave(self) -> None:
        """Moves read-outs at the end of a region out of it, where that keeps nothing more for the backward.

        These are new nodes whose readers are all outside, and whose operands are outside or are read outside by others as well.
        """
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
        home = self.region(node)

        def outside(other: Node) -> bool:
            region = self.region(other)
            return other in leaving or region is None or not region.lies_in(home)

        def crosses(operand: Node) -> bool:
            return outside(operand) or any(outside(user) and user not in leaving for user in operand.users)

        return all(map(outside, node.users)) and all(map(crosses, node.all_input_nodes))


class _Outliner:
    def __init__(self, graph: Graph, layout: Sequence[_Region | None]) -> None:
        self.source = graph
        self.places = _Places(graph, layout)

    def run(self) -> Graph:
        source = self.source
        copy = Graph(tracer_cls=source._tracer_cls)
        copy._codegen = source._codegen
        ordered = sorted(source.nodes, key=self.places.of.__getitem__)
        bodies: dict[str, Any] = {}
        self._write(copy, ordered, None, {}, bodies)
        copy.owning_module = _with_attributes(source.owning_module, bodies)
        return copy

    def _write(
        self,
        graph: Graph,
        nodes: Sequence[Node],
        region: _Region | None,
        written: dict[Node, Node],
        bodies: dict[str, Any],
    ) -> None:
        """Writes `nodes`, which lie in `region`, to `graph`; those of a region inside it as a call."""
        for inner, members in groupby(nodes, lambda node: self._child(node, region)):
            if inner is not None:  # a region's places are consecutive, and so are its nodes
                self._close(graph, list(members), inner, written, bodies)
                continue
            for node in members:
                written[node] = _copy_node(graph, node, written)
                written[node].meta = _clean(node.meta)

    def _child(self, node: Node, region: _Region | None) -> _Region | None:
        """The region directly below `region` that holds `node`, None if `region` itself does."""
        inner = self.places.region(node)
        while inner is not region and inner is not None and inner.parent is not region:
            inner = inner.parent
        return None if inner is region else inner

    def _close(
        self,
        graph: Graph,
        members: Sequence[Node],
        region: _Region,
        written: dict[Node, Node],
        bodies: dict[str, Any],
    ) -> None:
        inside = set(members)
        operands = dict.fromkeys(
            operand for node in members for operand in node.all_input_nodes if operand not in inside
        )
        results = [node for node in members if any(user not in inside for user in node.users)]
        body = Graph(tracer_cls=self.source._tracer_cls)
        within: dict[Node, Node] = {}
        for operand in operands:
            if _holds_module(operand):  # a graph is no argument: the body has it as an attribute
                within[operand] = _copy_node(body, operand, {})
            else:
                within[operand] = body.placeholder(operand.name)
            within[operand].meta = {key: value for key, value in operand.meta.items() if key in _SHARED}
        attributes: dict[str, Any] = {}
        self._write(body, members, region, within, attributes)
        body.output(tuple(within[node] for node in results)).meta = _clean(region.body.graph.output_node().meta)
        for node in (*members, *operands):
            if node.op in {"get_attr", "call_module"} and node in within:
                attributes[str(node.target)] = _attribute(node)
        module = fx.GraphModule(attributes, body, type(region.body).__name__)
        module.meta.update(region.body.meta)  # the policy of selective checkpointing is here

        origin = region.call.args[0]
        assert isinstance(origin, Node)
        name = _fresh(str(origin.target).replace(".", "_"), {str(n.target) for n in self._attributes()} | bodies.keys())
        bodies[name] = module
        holder = graph.create_node("get_attr", name, name=origin.name)
        holder.meta = _clean(origin.meta)
        arguments = (holder, *(written[operand] for operand in operands if not _holds_module(operand)))
        assert callable(region.call.target)
        call = graph.call_function(region.call.target, arguments, dict(region.call.kwargs), name=region.call.name)
        call.meta = {**_clean(region.call.meta), "example_value": tuple(_example(node) for node in results)}
        for index, node in enumerate(results):
            written[node] = graph.create_node("call_function", operator.getitem, (call, index), name=node.name)
            written[node].meta = _clean(node.meta)

    def _attributes(self) -> Iterable[Node]:
        return (node for node in self.source.nodes if node.op in {"get_attr", "call_module"})


def _holds_module(node: Node) -> bool:
    return node.op == "get_attr" and isinstance(_attribute(node), nn.Module)


def _clean(meta: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in meta.items() if key not in {_PLACE, _FIXED}}


def _example(node: Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


def _fresh(name: str, taken: set[str]) -> str:
    number, candidate = 0, name
    while candidate in taken:
        number += 1
        candidate = f"{name}_{number}"
    return candidate
