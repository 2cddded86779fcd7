"""Rewrites the chains of a plan to parallel streams."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch.fx import Graph, Node

from mhc_compile import ops as _ops  # noqa: F401 - registers the operators
from mhc_compile.passes.base import Pass, copy_graph
from mhc_compile.passes.lift import Region, lift
from mhc_compile.passes.roles import tensor_value
from mhc_compile.passes.splice import inherit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mhc_compile.passes.plan import Chain, Plan
    from mhc_compile.passes.verdict import Site

__all__ = ["Binding", "ExpandChains", "RemoveDeclarations"]


@dataclass(frozen=True)
class Binding:
    """The parameters and settings of one site. In a Dynamo graph the parameters are graph inputs, elsewhere paths of attributes."""

    phi: Node | str
    bias: Node | str
    scale: Node | str
    streams: int
    mapping: str
    iterations: int
    eps: float


@dataclass(frozen=True)
class ExpandChains(Pass):
    """Replaces the residual adds of every chain by hyper-connections on persistent streams.

    before: h1 = f(x0); x1 = torch.add(x0, h1); h2 = g(x1); x2 = torch.add(x1, h2); out = norm(x2)

    after:  S0 = x0.unsqueeze(-2).expand(-1, ..., n, -1)
            pre, post, res, _ = mhc.coefficients(S0, phi, bias, scale); x = mhc.collapse(S0, pre)
            h1 = f(x); S1 = mhc.update(S0, h1, post, res)
            (the same for g, giving S2)
            out = norm(S2.mean(-2))

    Streams start as copies and end as their mean. A reader of a trunk value inside the branch of its site gets the collapsed streams; every other
    reader (a final norm, a hidden state that is returned) gets the mean of the streams at that point. Trunk operations between two sites run on
    the streams.
    """

    name: ClassVar[str] = "expand-chains"

    #: The plan, made on the very graph that `apply` receives.
    plan: Plan
    #: Parameters for every site of the plan.
    bindings: Mapping[Site, Binding]

    def apply(self, graph: Graph) -> Graph:
        """A copy of `graph` on streams."""
        copy, nodes = copy_graph(graph)
        expansion = _Expansion(copy, nodes, self.bindings)
        # Outer chains first: what lies in the branch of an outer site then starts from the streams collapsed for that branch.
        for chain in sorted(self.plan.chains, key=lambda chain: -len(chain.sites[0].branch)):
            expansion.run(chain)
        return copy


@dataclass(frozen=True)
class RemoveDeclarations(Pass):
    """Takes the declarations of parameters out of the graph: the parameters are graph inputs by now.

    before: mhc.declare(phi, bias, scale)              after: (nothing)
    """

    name: ClassVar[str] = "remove-declarations"

    def apply(self, graph: Graph) -> Graph:
        """A copy of `graph` without `mhc::declare`."""
        copy, _ = copy_graph(graph)
        for node in list(copy.nodes):
            if node.target in (torch.ops.mhc.declare, torch.ops.mhc.declare.default):
                copy.erase_node(node)
        return copy


class _Expansion:
    """Expands chains in place, in a copy of the graph. `cursor` is the node after which the next one is written."""

    def __init__(self, graph: Graph, nodes: dict[Node, Node], bindings: Mapping[Site, Binding]) -> None:
        self.graph = graph
        self.nodes = nodes
        self.bindings = bindings
        #: Trunk values that another chain has replaced by the mean of its streams.
        self.replaced: dict[Node, Node] = {}
        self.cursor: Node = graph._root
        self.like: Node = graph._root

    def run(self, chain: Chain) -> None:
        first = chain.sites[0]
        start = self._start(first)
        self._follow(start, like=self.nodes[first.add])
        streams = self._spread(start, first.axis, self.bindings[first].streams)
        stages: list[tuple[Site, Region, Node, Node]] = []
        for site, region in zip(chain.sites, chain.links, strict=True):
            entry = self._lift(region, streams, self.bindings[site].streams)
            self._follow(entry, like=self.nodes[site.add])
            streams = self._site(site, start if site is first else self.nodes[site.skip], entry)
            stages.append((site, region, entry, streams))
        # Backwards, so that a value has lost the readers that disappear before its own readers are counted.
        for site, region, entry, after in reversed(stages):
            self._read_out(self.nodes[site.add], after, site.axis)
            for inner in reversed(site.adds[:-1]):
                self.graph.erase_node(self.nodes[inner])
            if region.nodes:
                self._read_out(self.nodes[site.skip], entry, site.axis)
                for node in reversed(region.nodes[:-1]):
                    if not self.nodes[node].users:  # one that is read elsewhere stays, and reads the mean
                        self.graph.erase_node(self.nodes[node])

    def _spread(self, start: Node, axis: int, n: int) -> Node:
        value = tensor_value(start)
        assert value is not None
        trunk = self._features_last(start, axis)
        wide = self._emit("trunk", "call_method", "unsqueeze", (trunk, -2))
        return self._emit("streams", "call_method", "expand", (wide, *[-1] * (value.dim() - 1), n, -1))

    def _lift(self, region: Region, streams: Node, n: int) -> Node:
        axes = {self.nodes[node]: axis for node, axis in region.axes.items()}
        lifted = {self.nodes[region.source]: streams}
        for node in region.nodes:
            old = self.nodes[node]
            self._follow(old, like=old)
            with self.graph.inserting_before(
                self.cursor.next
            ):  # `inserting_after` would reverse the order of several nodes
                new = lift(self.graph, old, lifted, axes, n)
            lifted[old] = streams = self._finish(new)
        return streams

    def _features_last(self, value: Node, axis: int) -> Node:
        """[..., C, ...] to [..., C]. A view."""
        example = tensor_value(value)
        if example is None or axis == example.dim() - 1:
            return value
        return self._emit("features_last", "call_method", "movedim", (value, axis, -1))

    def _features_back(self, value: Node, axis: int, like: Node) -> Node:
        """[..., C] to the layout of `like`, in memory as well: a later `view` in the model counts on its strides."""
        example = tensor_value(like)
        if example is None or axis == example.dim() - 1:
            return value
        moved = self._emit("features_back", "call_method", "movedim", (value, -1, axis))
        if (
            example.dim() == 4
            and not example.is_contiguous()
            and example.is_contiguous(memory_format=torch.channels_last)
        ):
            return self._call("features_back", torch.clone, moved, memory_format=torch.channels_last)
        return self._emit("features_back", "call_method", "contiguous", (moved,))

    def _start(self, site: Site) -> Node:
        """The trunk value that a chain starts from, as the first add reads it now."""
        for add in site.adds:
            for old, new in zip(add.args[:2], self.nodes[add].args[:2], strict=True):
                if old is site.skip:
                    assert isinstance(new, Node)
                    return new
        raise AssertionError(f"{site}: no add of the sum reads its skip {site.skip}")

    def _site(self, site: Site, skip: Node, streams: Node) -> Node:
        binding, add = self.bindings[site], self.nodes[site.add]
        branch = {self.nodes[node] for node in site.branch}
        readers = [user for user in skip.users if user in branch]
        mhc = torch.ops.mhc
        parameters = [self._parameter(name) for name in (binding.phi, binding.bias, binding.scale)]
        settings = (binding.mapping, binding.iterations, binding.eps)
        # Directly before their first reader: there the branch's own mode holds, which may be another than where the trunk was computed (no_grad).
        if readers:
            self._follow(min(readers).prev, like=add)
        packed = self._call("coefficients", mhc.coefficients.default, streams, *parameters, *settings)
        pre, post, res = (
            self._call(name, operator.getitem, packed, index) for index, name in enumerate(("pre", "post", "res"))
        )
        collapsed = self._features_back(self._call("collapsed", mhc.collapse.default, streams, pre), site.axis, skip)
        for reader in readers:
            reader.replace_input_with(skip, collapsed)
        self._follow(add.prev, like=add)
        total = self._now(site.terms[0])
        for term in site.terms[1:]:
            total = self._call("branches", torch.add, total, self._now(term))
        return self._call("streams", mhc.update.default, streams, self._features_last(total, site.axis), post, res)

    def _read_out(self, value: Node, streams: Node, axis: int) -> None:
        if value.users:
            self._follow(streams, like=value)
            mean = self._features_back(self._call("read_out", torch.mean, streams, -2), axis, value)
            value.replace_all_uses_with(mean)
            self.replaced[value] = mean
        self.graph.erase_node(value)

    def _parameter(self, name: Node | str) -> Node:
        return self.nodes[name] if isinstance(name, Node) else self._emit("parameter", "get_attr", name, ())

    def _now(self, node: Node) -> Node:
        """What stands for a node of the plan's graph at this moment."""
        copy = self.nodes[node]
        return self.replaced.get(copy, copy)

    def _follow(self, node: Node, like: Node) -> None:
        """Moves the cursor behind `node`, and behind all graph inputs; new nodes take their provenance from `like`."""
        while node.op == "placeholder" and node.next.op == "placeholder":
            node = node.next
        self.cursor, self.like = node, like

    def _call(self, name: str, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        return self._emit(name, "call_function", target, args, kwargs)

    def _emit(
        self, name: str, op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> Node:
        with self.graph.inserting_after(self.cursor):
            return self._finish(self.graph.create_node(op, target, args, kwargs or {}, f"mhc_{name}"))

    def _finish(self, node: Node) -> Node:
        node.meta = {}
        inherit(node, self.like)
        value = self._attribute(str(node.target)) if node.op == "get_attr" else _example(node)
        if value is not None:
            node.meta["example_value"] = value
        self.cursor = node
        return node

    def _attribute(self, path: str) -> Any:
        """Example value of a parameter that is an attribute: like the example values of the graph, without memory."""
        mode = next(
            (mode for node in self.graph.nodes if (mode := getattr(tensor_value(node), "fake_mode", None)) is not None),
            None,
        )
        if mode is None or self.graph.owning_module is None:
            return None
        owner, _, name = path.rpartition(".")
        return mode.from_tensor(getattr(self.graph.owning_module.get_submodule(owner), name))


def _example(node: Node) -> Any:
    """The example value of a new node, from those of its operands, so that later passes and reports know its shape."""

    def value(operand: Node) -> Any:
        return operand.meta.get("example_value", operand.meta.get("val"))

    operands = [value(operand) for operand in node.all_input_nodes]
    if any(operand is None for operand in operands):
        return None
    args = torch.fx.map_arg(node.args, value)
    kwargs = torch.fx.map_arg(node.kwargs, value)
    with torch.no_grad():
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]
