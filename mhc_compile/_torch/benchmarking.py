"""Kernel counts, caches and memory events for benchmarks."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor import metrics
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import MultiOutput
from torch._inductor.scheduler import ExternKernelSchedulerNode
from torch._inductor.utils import fresh_cache

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["caches", "has_kernel", "memory_events", "observe_graphs"]


def has_kernel(operator: str, device: str) -> bool:
    """Whether an operator ("mhc::step") runs on a device ("cpu", "cuda")."""
    keys = (device.upper(), "CompositeExplicitAutograd", "CompositeImplicitAutograd")
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(operator, key) for key in keys)


@contextmanager
def caches(*, cold: bool) -> Iterator[None]:
    """In here every graph is lowered anew.

    With `cold`, nothing that was compiled before is found, on disk or in this process, and nothing
    is left behind. Without, machine code is found where the same source was compiled before.
    """
    if cold:
        with tempfile.TemporaryDirectory(prefix="mhc-bench-") as folder, fresh_cache(dir=folder, delete=False):
            yield
    else:
        with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
            yield


@contextmanager
def observe_graphs(see: Callable[[int, int, int], None]) -> Iterator[None]:
    """Call `see(kernels, externs, bytes)` for every graph that Inductor compiles.

    kernels: that Inductor generated (`metrics.generated_kernel_count`; on CPU a kernel is a
        parallel loop nest). externs: calls of operators
    that it did not generate. bytes: read and written, as `GraphLowering.count_bytes` has it, which
    is what `metrics.num_bytes_accessed` adds up when its log is on.
    """
    original = GraphLowering.compile_to_module

    def compile_to_module(graph: Any) -> Any:
        before = metrics.generated_kernel_count
        module = original(graph)
        externs = [node for node in graph.scheduler.nodes if isinstance(node, ExternKernelSchedulerNode)]
        # An operator with results of its own layout has a node for each of them beside the call.
        calls = [node for node in externs if not isinstance(node.node, MultiOutput)]
        see(metrics.generated_kernel_count - before, len(calls), int(graph.count_bytes()[0]))
        return module

    with mock.patch.object(GraphLowering, "compile_to_module", compile_to_module):
        yield


def memory_events(profile: torch.profiler.profile) -> list[tuple[int, str, int]]:
    """Return `(nanoseconds, name, bytes)` of every event of a profile with `profile_memory=True`.

    Allocations have the name "[memory]" and positive bytes, frees the same name and negative bytes;
    bytes of other events mean nothing.
    """
    results: Any = profile.profiler
    events = results.kineto_results.events()
    return sorted((event.start_ns(), event.name(), event.nbytes()) for event in events)
