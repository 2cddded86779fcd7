"""Time and memory of the graph passes over the size of the graph: both should be linear.

    python -m mhc_compile.tools.bench.passes [NODES ...]

The graph is a decoder, traced symbolically. Every layer has two residual adds, and two rotary
additions that are rejected. Times are the least of three runs, without tracing and compilation.
"""

from __future__ import annotations

import gc
import sys
import time
import tracemalloc
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, fx, nn

from mhc_compile._torch.benchmarking import propagate_fake_tensors
from mhc_compile.modules.hyper_connection import HyperConnection
from mhc_compile.passes import expand_plan, normalize, plan_chains
from mhc_compile.passes.analysis.provenance import Provenance
from mhc_compile.passes.transforms.stream_builder import Binding

if TYPE_CHECKING:
    from collections.abc import Iterable

_WIDTH = 8


class _Layers(nn.Module):
    """A decoder with RMS norms by hand, rotary positions and gated MLPs; layers share weights."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers, self.scale = layers, nn.Parameter(torch.ones(_WIDTH))
        self.query, self.key, self.value, self.out = (nn.Linear(_WIDTH, _WIDTH) for _ in range(4))
        self.gate, self.up, self.down = (nn.Linear(_WIDTH, _WIDTH) for _ in range(3))

    def norm(self, x: Tensor) -> Tensor:
        return self.scale * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    @staticmethod
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    @staticmethod
    def heads(x: Tensor) -> Tensor:
        return x.view(2, 4, 2, _WIDTH // 2).transpose(1, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        for _ in range(self.layers):
            hidden = self.norm(x)
            query, key, value = (self.heads(linear(hidden)) for linear in (self.query, self.key, self.value))
            query, key = self.rotate(query, cos, sin), self.rotate(key, cos, sin)
            mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(2, 4, _WIDTH))
            hidden = self.norm(x)
            x = x + self.down(nn.functional.silu(self.gate(hidden)) * self.up(hidden))
        return x


class Measurement(NamedTuple):
    """Seconds of each stage and their peak memory in bytes, for a graph of `nodes` nodes."""

    nodes: int
    sites: int
    normalize: float
    plan: float
    expand: float
    peak: int


def measure(nodes: int, *, runs: int = 3, memory: bool = True) -> Measurement:
    """Run the passes on a graph of about `nodes` nodes; the peak is 0 without `memory`."""
    one, two = (len(fx.symbolic_trace(_Layers(layers)).graph.nodes) for layers in (1, 2))
    module = fx.symbolic_trace(_Layers(max(1, round(nodes / (two - one)))))
    positions = torch.zeros(4, _WIDTH // 2)
    inputs = (torch.zeros(2, 4, _WIDTH), positions, positions)
    propagate_fake_tensors(module, *inputs)
    module.hyper = HyperConnection(_WIDTH)
    gc.collect()
    gc.freeze()  # the collector need not traverse the graph in every run
    (sites, *_), *stages = zip(*(_run(module) for _ in range(runs)), strict=True)
    normalized, planned, expanded = map(min, stages)
    peak = 0
    if memory:
        tracemalloc.start()
        _run(module)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    gc.unfreeze()
    return Measurement(len(module.graph.nodes), int(sites), normalized, planned, expanded, peak)


def _run(module: fx.GraphModule) -> tuple[float, ...]:
    """Return the number of sites, and the seconds of each stage."""
    start = time.perf_counter()
    graph = normalize(module.graph)
    normalized = time.perf_counter()
    plan = plan_chains(graph, Provenance())
    planned = time.perf_counter()
    binding = Binding("hyper.phi", "hyper.bias", "hyper.scale", 4, "sinkhorn", 20, 1e-6)
    expand_plan(graph, plan, dict.fromkeys(plan.sites, binding))
    return len(plan.sites), normalized - start, planned - normalized, time.perf_counter() - planned


def _main(sizes: Iterable[int]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("nodes", "sites", "normalize", "plan", "expand", "all, s", "MiB", "µs/node")
    for size in sizes:
        m = measure(size)
        total = m.normalize + m.plan + m.expand
        times = (f"{seconds:.3f}" for seconds in (m.normalize, m.plan, m.expand, total))
        table.add_row(f"{m.nodes:,}", f"{m.sites:,}", *times, f"{m.peak / 2**20:.0f}", f"{total / m.nodes * 1e6:.0f}")
    Console().print(table)


if __name__ == "__main__":
    _main([int(size) for size in sys.argv[1:]] or [2_500, 5_000, 10_000, 20_000])
