"""Inline the regions of activation checkpointing, and keep every operation's place.

Under Dynamo, `torch.utils.checkpoint` puts the operations of a block into their own graph, the body
of a `tag_activation_checkpoint`. The passes between `InlineRegions` and `OutlineRegions` see one
flat graph, so that chains run through regions as if they were not there.

In the flat graph every operation of the model has a place, the number of its section:

    x = embed()                      0  outside
    ├ h = f(x); y = x + h            1  first region
    │                                2  outside, and empty
    ├ g = f(y); z = y + g            3  second region
    out = norm(z)                    4  outside

A nested region has its own sections in the middle of the outer one's. Nodes that later passes write
inherit the place of the node that they stand for as a preference, and get it as far as data flow
permits (`outline_regions`). Operations of the model never change their order: random numbers,
in-place writes and switches of autocast stay where they are.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx, nn
from torch.fx import Node

from mhc_compile._torch import copy_node, new_graph_like, shallow_copy
from mhc_compile.passes.core.pass_base import Pass

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.fx import Graph

#: The key of `Node.meta` of a node's place, between the two passes. New nodes inherit it (see
#: `emit.PROVENANCE`).
PLACE = "mhc_region"
#: The key that marks the nodes of the model. New nodes do not inherit it.
FIXED = "mhc_fixed"
_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


@dataclass(frozen=True, eq=False)
class Region:
    """One call of a body, with what is needed to write the call again."""

    call: Node
    body: fx.GraphModule
    parent: Region | None

    def lies_in(self, other: Region | None) -> bool:
        """Return whether this is `other` or lies in it. All lie in None, the outermost graph."""
        return other is None or self is other or (self.parent is not None and self.parent.lies_in(other))


@dataclass(frozen=True)
class Place:
    """A section of the flat graph: `layout[index]` is its region, None outside of all regions."""

    index: int
    layout: list[Region | None] = field(repr=False, compare=False)


@dataclass(frozen=True)
class InlineRegions(Pass):
    """Write the operations of checkpointed regions into the graph that calls them.

    before: body = self.wrap_body_0; out = tag_activation_checkpoint(body, x, weight); y = out[0]
    after:  h = linear(x, weight); y = x + h                                 (each with its place)

    Other regions (`cond`, `invoke_subgraph`) stay calls, and so does a checkpoint whose call has
    another form. Placeholders of a body become the arguments of its call. A body that is called
    twice is written twice.
    """

    name: ClassVar[str] = "inline-regions"

    def apply(self, graph: Graph) -> Graph:
        """Return a flat copy of `graph`, or the graph itself if it has no such region."""
        if not any(_body(node) is not None for node in graph.nodes):
            return graph
        return _Inliner(graph).run()


def _body(call: Node) -> fx.GraphModule | None:
    """Return the body of a checkpointed region, None for other nodes and unknown forms."""
    if call.target is not _CHECKPOINT or not call.args or not isinstance(call.args[0], Node):
        return None
    body = attribute_of(call.args[0])
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


def attribute_of(node: Node) -> Any:
    """Return what a `get_attr` or `call_module` node names."""
    value: Any = node.graph.owning_module if node.op in {"get_attr", "call_module"} else None
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value


class _Inliner:
    def __init__(self, graph: Graph) -> None:
        self.source = graph
        self.copy = new_graph_like(graph)
        self.layout: list[Region | None] = [None]
        #: Attributes of bodies that become attributes of the flat graph's module.
        self.attributes: dict[str, Any] = {}

    def run(self) -> Graph:
        result = self._write(self.source, None, {})
        output = self.copy.output(result)
        output.meta = {**self.source.output_node().meta, PLACE: self._here(), FIXED: True}
        self.copy.owning_module = with_attributes(self.source.owning_module, self.attributes)
        return self.copy

    def _here(self) -> Place:
        return Place(len(self.layout) - 1, self.layout)

    def _write(self, graph: Graph, region: Region | None, nodes: dict[Node, Node]) -> Any:
        """Copy `graph`, whose nodes in `nodes` are given, and return what stands for its result."""
        opened: dict[Node, Sequence[Node]] = {}
        bodies = {node.args[0] for node in graph.nodes if _body(node) is not None}
        for node in graph.nodes:
            body = _body(node)
            if node in nodes or (node in bodies and all(_body(user) is not None for user in node.users)):
                continue
            if node.op == "output":
                return fx.map_arg(node.args[0], lambda operand: nodes[operand])
            if body is not None:
                opened[node] = self._open(Region(node, body, region), [nodes[operand] for operand in node.args[1:]])
            elif node.target is operator.getitem and node.args[0] in opened:
                nodes[node] = opened[node.args[0]][node.args[1]]
            else:
                nodes[node] = self._copy(node, region, nodes)
        raise AssertionError("a graph without output")

    def _open(self, region: Region, arguments: Sequence[Node]) -> Sequence[Node]:
        given = dict(zip(region.body.graph.find_nodes(op="placeholder"), arguments, strict=True))
        self.layout.append(region)
        results: Sequence[Node] = self._write(region.body.graph, region, given)
        self.layout.append(region.parent)
        return results

    def _copy(self, node: Node, region: Region | None, nodes: Mapping[Node, Node]) -> Node:
        twin = copy_node(self.copy, node, nodes)
        twin.meta.update({PLACE: self._here(), FIXED: True})
        if region is not None and node.op in {"get_attr", "call_module"}:
            twin.target = self._keep(str(node.target), attribute_of(node))
        return twin

    def _keep(self, name: str, value: Any) -> str:
        """Return the name of a body's attribute on the flat graph's module."""
        base, number = name.replace(".", "_"), 0
        name = base
        while (known := self.attributes.get(name, getattr(self.source.owning_module, name, None))) is not value:
            if known is None:
                self.attributes[name] = value
                break
            number += 1
            name = f"{base}_{number}"
        return name


def with_attributes(owner: nn.Module | None, attributes: Mapping[str, Any]) -> Any:
    """Return a module with the attributes of `owner` and some more. `owner` is not changed."""
    if not attributes:
        return owner
    twin = shallow_copy(owner)
    for name, value in attributes.items():
        setattr(twin, name, value)
    return twin
