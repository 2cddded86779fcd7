"""Estimated overhead of a training step from the rooflines of known machines. Nothing is measured.

    step time = FLOPs / F + bytes / B     F, B: the machine's peak arithmetic and memory bandwidth
    overhead  = time of the sites' added work / time of the plain model

The bytes of the plain model are counted on its graph. A matrix product, a convolution, attention
and a recurrence read their operands and write their results. The elementwise operations between
them (norms, activations, adds) count as one kernel, which reads its inputs and writes its outputs.
A weight is read once per pass, for any number of tokens. A backward pass counts as two forward
passes, for both, so the share of a forward pass is that of a training step.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from mhc_compile import _torch
from mhc_compile.capture.tensor_tree import tensors
from mhc_compile.inspection.cost import Work
from mhc_compile.passes.analysis.op_info import example_value, is_contraction, is_region, is_view, op_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.fx import Graph, GraphModule, Node

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Machine:
    """Peak figures of one machine."""

    name: str  #: product name
    dtype: str  #: of operands, activations and weights
    itemsize: int  #: bytes of one element
    flops: float  #: floating-point operations of dense matrix products per second
    bandwidth: float  #: bytes per second
    source: str  #: origin of the figures

    def seconds(self, work: Work, *, weights: bool = True) -> float:
        """Return the time of a forward pass, with or without the time to read the weights."""
        elements = work.activations + work.weights * weights
        return work.flops / self.flops + elements * self.itemsize / self.bandwidth


_INFINITE = float("inf")
#: Dense bfloat16 figures of NVIDIA's data sheets. The first two are the limits of all machines.
MACHINES = (
    Machine("compute alone", "bfloat16", 2, 1.0, _INFINITE, "the limit of infinite memory bandwidth"),
    Machine("memory alone", "bfloat16", 2, _INFINITE, 1.0, "the limit of infinite arithmetic"),
    Machine("NVIDIA A100 SXM 80GB", "bfloat16", 2, 312e12, 2.039e12, "NVIDIA A100 data sheet"),
    Machine("NVIDIA H100 SXM", "bfloat16", 2, 989e12, 3.35e12, "NVIDIA H100 data sheet"),
    Machine("NVIDIA H200 SXM", "bfloat16", 2, 989e12, 4.8e12, "NVIDIA H200 data sheet"),
)


@dataclass(frozen=True)
class Overhead:
    """Estimated overhead on one machine, as shares of the plain step: 0.05 is 5 % more time."""

    machine: Machine
    here: float  #: with the tokens of the example inputs, which share the reading of the weights
    many_tokens: float  #: with so many tokens per pass that reading the weights is negligible
    floor: float  #: like `many_tokens`, if a site were one kernel that moves no more bytes than it must

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON data, without the infinite figures of a limit."""
        machine = {name: value for name, value in asdict(self.machine).items() if value != _INFINITE}
        return {**asdict(self), "machine": machine}


def overheads(plain: Work, added: Work, floor: Work) -> tuple[Overhead, ...]:
    """Return the estimated overhead on each of `MACHINES`.

    `plain` is the work of one forward pass of the plain model, `added` that of the sites beyond the
    plain adds, as they are lowered now, and `floor` the same at the floor of bytes.
    """

    def share(machine: Machine, more: Work, weights: bool) -> float:
        whole = machine.seconds(plain, weights=weights)
        return machine.seconds(more, weights=weights) / whole if whole else 0.0

    columns = ((added, True), (added, False), (floor, False))
    return tuple(Overhead(machine, *(share(machine, *column) for column in columns)) for machine in MACHINES)


def plain_flops(graph_module: GraphModule) -> int | None:
    """Return the FLOPs of one forward pass of a traced graph on its example values.

    None if an operation cannot run on them.
    """
    inputs = [example_value(node) for node in graph_module.graph.nodes if node.op == "placeholder"]
    mode = next((value.fake_mode for value in inputs if hasattr(value, "fake_mode")), contextlib.nullcontext())
    counter = _torch.flop_counter()
    try:
        with mode, counter, torch.no_grad():
            torch.fx.Interpreter(graph_module).run(*inputs)
    except Exception:  # an estimate must not make a report fail, whatever a model's operations raise
        log.debug("the FLOPs of a graph could not be counted", exc_info=True)
        return None
    return _torch.example_size(counter.get_total_flops())


def traffic(graph: Graph, holds_weights: Callable[[Node], bool]) -> Work:
    """Return the elements that a graph reads and writes on its example values, with 0 FLOPs.

    The graph is plain and normalized. `holds_weights` says whether an input of it is a parameter or
    a buffer.
    """
    count = _Count(graph, holds_weights)
    # The results of products are counted already.
    writes = count.writes - count.inputs - count.products - count.fixed
    moved = count.moved + sum(_elements(node) for _, node in count.reads) + sum(map(_elements, writes))
    return Work(0, moved, sum(map(_elements, count.weights & count.inputs)))


class _Count:
    """Count of reads and writes. In this class a product is any contraction or region.

    Elementwise operations with the same number of products on their longest path from the inputs
    form one kernel.
    """

    def __init__(self, graph: Graph, holds_weights: Callable[[Node], bool]) -> None:
        self.holds_weights = holds_weights
        #: The source of a view.
        self.seen: dict[Node, Node] = {}
        #: The number of products on the longest path to a value: the kernel that computes it.
        self.depth: dict[Node, int] = {}
        self.products: set[Node] = set()
        self.inputs: set[Node] = set()
        #: Weights, and values computed from weights alone.
        self.fixed: set[Node] = set()
        self.weights: set[Node] = set()
        self.reads: set[tuple[int, Node]] = set()
        self.writes: set[Node] = set()
        self.moved = 0
        for node in graph.nodes:
            self._visit(node)

    def _visit(self, node: Node) -> None:
        operands = {operand: self.seen.get(operand, operand) for operand in node.all_input_nodes}
        sources = list(operands.values())
        if node.op in {"placeholder", "get_attr"}:
            self.inputs.add(node)
            self.depth[node] = 0
            if self.holds_weights(node):
                self.fixed.add(node)
        elif node.op == "output":
            self.writes.update(sources)
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
                self.weights.add(source)
            else:
                self.writes.add(source)
                # A view may be of a part of its source, or repeat it.
                self.moved += min(_elements(operand), _elements(source))
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
                    self.moved += _elements(node)  # the rows that are looked up
                else:
                    self.weights.add(source)
            elif source in self.inputs or source in self.products or self.depth[source] != kernel:
                self.writes.add(source)
                self.reads.add((kernel, source))


def _elements(node: Node) -> int:
    """Return the number of elements of all floating-point tensors in the value of `node`."""
    found = tensors(example_value(node), "")
    return sum(_torch.example_size(value.numel()) for _, value in found if value.is_floating_point())
