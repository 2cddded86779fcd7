"""Write operations on streams into a graph, with example values and provenance."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from mhc_compile import ops as _ops  # noqa: F401 - registers the operators
from mhc_compile.passes.analysis.op_info import example_value, tensor_value
from mhc_compile.passes.core.emit import compute_example, inherit

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class End:
    """The end of a chain: how its streams become one value.

    Attributes:
        kind: "mean" or "sum" of the streams; "pre", their sum with the weights of the last site;
            "learned" or "gated", an operator with parameters.
        parameters: of that operator.
        pre_eps: its epsilon.
    """

    kind: str = "mean"
    parameters: tuple[Node | str, ...] = ()
    pre_eps: float = 0.0

    @property
    def between(self) -> End:
        """What a reader of a trunk value inside the chain gets."""
        return End("sum" if self.kind == "sum" else "mean")


@dataclass(frozen=True)
class Binding:
    """The parameters (graph inputs in a Dynamo graph, else attribute paths) and settings of a site.

    Attributes:
        phi: its projection.
        bias: its static logits; with `gated`, the weight of its norm.
        scale: the factors of its logits; with `gated`, the projection to the gates.
        streams: n.
        spec: the convention of its coefficients, as the operators take it.
        iterations: of Sinkhorn.
        eps: under the root mean square.
        gated: whether it reads every channel with a weight of its own.
        single_pass: whether its weights collapse the streams for the next site.
        end: what ends the chain, if it is the last site.
    """

    phi: Node | str
    bias: Node | str
    scale: Node | str
    streams: int
    spec: str
    iterations: int
    eps: float
    gated: bool = False
    single_pass: bool = False
    end: End = End()


class StreamBuilder:
    """Writes into a copy of a graph, after the node `cursor`, with the provenance of `like`.

    `nodes` are the nodes of the copy, by those of the original.
    """

    def __init__(self, graph: Graph, nodes: dict[Node, Node]) -> None:
        self.graph = graph
        self.nodes = nodes
        self.cursor: Node = next(iter(graph.nodes))
        self.like: Node = self.cursor
        #: Example values of coefficients, by the shapes that they come from.
        self._coefficients_like: dict[tuple[Any, ...], Any] = {}

    def _follow(self, node: Node, like: Node) -> None:
        """Set the cursor to `node` and all graph inputs; new nodes get the provenance of `like`."""
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
        inherit(node, self.like)
        self.cursor = node
        if "example_value" in node.meta:
            return node
        value = None
        if node.target is torch.ops.mhc.coefficients.default:
            value = self._coefficients_like.get(self._shapes(node))
        if value is None:
            value = self._example(node)
        if value is not None:
            node.meta["example_value"] = value
        return node

    def _example(self, node: Node) -> Any:
        """Return the example value of a new node: later passes and reports read its shape."""
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        if node.op == "call_module":  # only leaf modules that keep the shape are lifted
            return example_value(node.all_input_nodes[0])
        return compute_example(node.op, node.target, node.args, node.kwargs)

    def _attribute(self, path: str) -> Any:
        """Return the example value of a parameter that is an attribute: a fake tensor."""
        modes = (getattr(tensor_value(node), "fake_mode", None) for node in self.graph.nodes)
        mode = next((mode for mode in modes if mode is not None), None)
        if mode is None or self.graph.owning_module is None:
            return None
        owner, _, name = path.rpartition(".")
        return mode.from_tensor(getattr(self.graph.owning_module.get_submodule(owner), name))

    def _features_last(self, value: Node, axis: int) -> Node:
        """Move the features last: [..., C, ...] to [..., C]. A view."""
        example = tensor_value(value)
        if example is None or axis == example.dim() - 1:
            return value
        return self._emit("features_last", "call_method", "movedim", (value, axis, -1))

    def _features_back(self, value: Node, axis: int, like: Node) -> Node:
        """Move the features back to the layout of `like`, in memory too: views rely on strides."""
        example = tensor_value(like)
        if example is None or axis == example.dim() - 1:
            return value
        moved = self._emit("features_back", "call_method", "movedim", (value, -1, axis))
        wide = example.dim() == 4 and example.is_contiguous(memory_format=torch.channels_last)
        if wide and not example.is_contiguous():
            return self._call("features_back", torch.clone, moved, memory_format=torch.channels_last)
        return self._emit("features_back", "call_method", "contiguous", (moved,))

    def _input(self, name: str, like: Node, value: Tensor) -> Node:
        """Add a graph input after all others."""
        last = next(node for node in reversed(self.graph.nodes) if node.op == "placeholder")
        names = {node.target for node in self.graph.find_nodes(op="placeholder")}
        number = next(number for number in count() if f"mhc_arriving_{name}_{number}" not in names)
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(f"mhc_arriving_{name}_{number}")
        node.meta["example_value"] = value
        inherit(node, self.nodes[like])
        return node

    def _read(self, binding: Binding, streams: Node) -> list[Node]:
        """Write a branch's input [..., C] and its site's weights: `[h, pre, post, res]`.

        A gated read has no pre.
        """
        if binding.gated:
            parameters = [self._parameter(name) for name in (binding.phi, binding.bias, binding.scale)]
            packed = self._call("read", torch.ops.mhc.gated_read.default, streams, *parameters, binding.eps)
            h, post, res = (
                self._call(name, operator.getitem, packed, i) for i, name in enumerate(("collapsed", "post", "res"))
            )
            return [h, h, post, res]
        pre, post, res = self._coefficients(binding, streams)
        return [self._call("collapsed", torch.ops.mhc.collapse.default, streams, pre), pre, post, res]

    def _end(self, end: End, eps: float, streams: Node, pre: Node | None) -> Node:
        """Write the result of a chain, [..., C]; `pre` are the weights of the last site."""
        if end.kind == "pre":
            assert pre is not None
            return self._call("read_out", torch.ops.mhc.collapse.default, streams, pre)
        if end.kind in ("mean", "sum"):
            return self._call("read_out", getattr(torch, end.kind), streams, -2)
        parameters = [self._parameter(name) for name in end.parameters]
        if end.kind == "gated":
            return self._call("read_out", torch.ops.mhc.gated_read_out.default, streams, *parameters, eps)
        return self._call("read_out", torch.ops.mhc.read_out.default, streams, *parameters, end.pre_eps, eps)

    def _coefficients(self, binding: Binding, streams: Node) -> list[Node]:
        parameters = [self._parameter(name) for name in (binding.phi, binding.bias, binding.scale)]
        settings = (binding.spec, binding.iterations, binding.eps)
        packed = self._call("coefficients", torch.ops.mhc.coefficients.default, streams, *parameters, *settings)
        parts = [self._call(name, operator.getitem, packed, index) for index, name in enumerate(("pre", "post", "res"))]
        self._coefficients_like.setdefault(self._shapes(packed), packed.meta.get("example_value"))
        return parts

    def _shapes(self, packed: Node) -> tuple[Any, ...]:
        """Return what the example values of coefficients depend on: equal sites share them."""
        operands = [tensor_value(operand) for operand in packed.all_input_nodes]
        return tuple((str(value.shape), value.dtype, value.device) if value is not None else None for value in operands)

    def _parameter(self, name: Node | str) -> Node:
        return self.nodes[name] if isinstance(name, Node) else self._emit("parameter", "get_attr", name, ())
