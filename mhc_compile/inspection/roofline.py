"""What share of a training step hyper-connections add, from the rooflines of known machines: an estimate, nothing is measured.

    step time = FLOPs / F + bytes / B           F, B: the machine's peak arithmetic and memory bandwidth
    overhead  = time of what the sites add / time of the plain model

The plain model's bytes are counted on its graph. A product, a convolution, attention and a recurrence read their operands and write their results.
The elementwise operations between them (norms, activations, adds) are taken as one kernel, which reads what enters it and writes what leaves it. A
weight is read once per pass, however many tokens there are. A backward pass is taken as twice the forward pass, for both, so that the share is that
of a training step as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils import _pytree as pytree

from mhc_compile import _torch
from mhc_compile.inspection.cost import site_cost
from mhc_compile.passes.analysis.op_info import is_contraction, is_region, is_view, op_name, tensor_value

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.fx import Graph, Node

    from mhc_compile.config.options import ResolvedOptions
    from mhc_compile.passes import Site

__all__ = ["MACHINES", "Machine", "Overhead", "Work", "overheads", "site_work", "traffic"]


@dataclass(frozen=True)
class Work:
    """What one forward pass does.

    Attributes:
        flops: floating-point operations of products, convolutions and attention.
        activations: elements of activations that are read and written; grows with the tokens.
        weights: elements of weights that are read; the same for any number of tokens.
    """

    flops: int = 0
    activations: int = 0
    weights: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.activations + other.activations, self.weights + other.weights)


@dataclass(frozen=True)
class Machine:
    """Peak figures of one machine.

    Attributes:
        name: as it is sold.
        dtype: of the products, activations and weights, `itemsize` bytes each.
        flops: dense products, per second.
        bandwidth: bytes per second.
        source: where the figures are from.
    """

    name: str
    dtype: str
    itemsize: int
    flops: float
    bandwidth: float
    source: str

    def seconds(self, work: Work, *, weights: bool = True) -> float:
        """Time of one forward pass; without `weights`, where so many tokens share them that their bytes do not count."""
        elements = work.activations + work.weights * weights
        return work.flops / self.flops + elements * self.itemsize / self.bandwidth


_FOREVER = float("inf")
#: Dense bfloat16 figures of NVIDIA's data sheets. The two first rows are what any machine between them approaches.
MACHINES = (
    Machine("arithmetic alone", "bfloat16", 2, 1.0, _FOREVER, "a machine whose memory is never waited for"),
    Machine("memory alone", "bfloat16", 2, _FOREVER, 1.0, "a machine whose arithmetic is never waited for"),
    Machine("NVIDIA A100 SXM 80GB", "bfloat16", 2, 312e12, 2.039e12, "NVIDIA A100 data sheet"),
    Machine("NVIDIA H100 SXM", "bfloat16", 2, 989e12, 3.35e12, "NVIDIA H100 data sheet"),
    Machine("NVIDIA H200 SXM", "bfloat16", 2, 989e12, 4.8e12, "NVIDIA H200 data sheet"),
)


@dataclass(frozen=True)
class Overhead:
    """Expected overhead on one machine, as shares of the plain step: 0.05 is 5 % more time.

    Attributes:
        machine: whose figures were used.
        here: with the tokens of the example inputs, which share the reading of the weights.
        many_tokens: with so many tokens a pass that reading the weights does not count.
        floor: as `many_tokens`, if every site moved no more bytes than it must (everything of a site in one kernel).
    """

    machine: Machine
    here: float
    many_tokens: float
    floor: float


def overheads(plain: Work, added: Work, floor: Work) -> tuple[Overhead, ...]:
    """The expected overhead on each of `MACHINES`.

    Args:
        plain: one forward pass of the plain model.
        added: what the sites do beyond the plain adds, as they are lowered now.
        floor: the same at the floor of bytes.
    """

    def share(machine: Machine, more: Work, *, weights: bool) -> float:
        whole = machine.seconds(plain, weights=weights)
        return machine.seconds(more, weights=weights) / whole if whole else 0.0

    return tuple(
        Overhead(
            machine,
            share(machine, added, weights=True),
            share(machine, added, weights=False),
            share(machine, floor, weights=False),
        )
        for machine in MACHINES
    )


def site_work(site: Site, options: ResolvedOptions) -> tuple[Work, Work]:
    """What one site does beyond its plain add, for all tokens of the example inputs: as lowered now, and at the floor."""
    value = tensor_value(site.add)
    assert value is not None
    tokens = _torch.example_size(value.numel()) // site.width
    cost = site_cost(site.width, 1, options)
    lowered, floor = (
        Work(cost.flops * tokens, (moved - cost.bytes_plain) * tokens, cost.parameters)
        for moved in (cost.bytes_lowered, cost.bytes_floor)
    )
    return lowered, floor


def traffic(graph: Graph, holds_weights: Callable[[Node], bool]) -> Work:
    """The bytes of `Work` for a graph with example values; its `flops` are 0.

    Args:
        graph: a plain, normalised graph.
        holds_weights: whether a graph input is a parameter or a buffer.
    """
    return _Count(graph, holds_weights).work()


class _Count:
    """Operations between two products form one kernel: those that wait for the same number of products on their longest way from the inputs."""

    def __init__(self, graph: Graph, holds_weights: Callable[[Node], bool]) -> None:
        self.holds_weights = holds_weights
        #: What a view looks at.
        self.seen: dict[Node, Node] = {}
        #: The number of products on the longest way to a value, and with it the kernel that an elementwise operation belongs to.
        self.depth: dict[Node, int] = {}
        self.products: set[Node] = set()
        self.inputs: set[Node] = set()
        #: Weights, and what is computed from weights alone.
        self.fixed: set[Node] = set()
        self.weights: set[Node] = set()
        self.reads: set[tuple[int, Node]] = set()
        self.writes: set[Node] = set()
        self.moved = 0
        for node in graph.nodes:
            self._visit(node)

    def work(self) -> Work:
        """Everything that was counted."""
        moved = sum(_elements(node) for _, node in self.reads) + sum(_elements(node) for node in self.writes)
        return Work(0, self.moved + moved, sum(_elements(node) for node in self.weights))

    def _visit(self, node: Node) -> None:
        operands = {operand: self.seen.get(operand, operand) for operand in node.all_input_nodes}
        sources = list(operands.values())
        if node.op in {"placeholder", "get_attr"}:
            self.inputs.add(node)
            self.depth[node] = 0
            if self.holds_weights(node):
                self.fixed.add(node)
        elif node.op == "output":
            for source in sources:
                self._write(source)
        elif sources and is_view(node) and not is_contraction(node):
            self.seen[node] = sources[0]
        else:
            self.depth[node] = max((self.depth[source] for source in sources), default=0)
            if is_contraction(node) or is_region(node):
                self._product(node, operands)
            else:
                self._elementwise(node, sources)

    def _product(self, node: Node, operands: dict[Node, Node]) -> None:
        for operand, source in operands.items():
            if source in self.fixed:
                self._read_weight(source)
            else:
                self._write(source)
                self.moved += min(
                    _elements(operand), _elements(source)
                )  # a view may be of a part, or repeat what it sees
        self.moved += _elements(node)
        self.products.add(node)
        self.depth[node] += 1

    def _elementwise(self, node: Node, sources: list[Node]) -> None:
        if sources and self.fixed.issuperset(sources):
            self.fixed.add(node)
        kernel = self.depth[node]
        for source in sources:
            if source in self.fixed:
                if op_name(node) == "embedding":
                    self.moved += _elements(node)  # of the table, the rows that are looked up
                else:
                    self._read_weight(source)
            elif source in self.inputs or source in self.products or self.depth[source] != kernel:
                self._write(source)
                self.reads.add((kernel, source))

    def _read_weight(self, source: Node) -> None:
        if source in self.inputs:
            self.weights.add(source)

    def _write(self, source: Node) -> None:
        """Notes that a value leaves its kernel. Products write their results anyhow."""
        if source not in self.inputs and source not in self.products and source not in self.fixed:
            self.writes.add(source)


def _elements(node: Node) -> int:
    """Of all floating-point tensors that the node stands for."""
    value = node.meta.get("example_value", node.meta.get("val"))
    tensors = (leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor))
    return sum(_torch.example_size(tensor.numel()) for tensor in tensors if tensor.is_floating_point())
