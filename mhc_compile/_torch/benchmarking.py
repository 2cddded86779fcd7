"""Private names of torch that measurements use. Checked on torch 2.13.0 (CPU)."""

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
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def has_kernel(operator: str, device: str) -> bool:
    """Return whether an operator ("mhc::step") runs on a device ("cpu", "cuda")."""
    keys = (device.upper(), "CompositeExplicitAutograd", "CompositeImplicitAutograd")
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(operator, key) for key in keys)


def warm_up(device: str = "cpu") -> None:
    """Compile a one-line function and its backward; the first compilation loads the compiler."""
    torch.compile(lambda x: x.sin().sum())(torch.ones(8, device=device, requires_grad=True)).backward()


def propagate_fake_tensors(module: torch.fx.GraphModule, *inputs: torch.Tensor) -> None:
    """Store an example value without data in `node.meta["val"]` of every node of `module`."""
    FakeTensorProp(module, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*inputs)


@contextmanager
def caches(*, cold: bool) -> Iterator[None]:
    """Lower every graph inside this context, even one that Inductor's cache of graphs holds.

    With `cold`, all caches of compiled code are empty, and nothing is kept. Without it, machine
    code of the same source is reused.
    """
    if cold:
        with tempfile.TemporaryDirectory(prefix="mhc-bench-") as folder, fresh_cache(dir=folder, delete=False):
            yield
    else:
        with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
            yield


@contextmanager
def observe_graphs(see: Callable[[int, int, int], None]) -> Iterator[None]:
    """Call `see(kernels, externs, bytes)` for every graph that Inductor compiles in this context.

    That is the number of kernels that Inductor generated (on CPU a parallel loop nest), of calls of
    operators that it did not generate, and the bytes read and written.
    """
    original = GraphLowering.compile_to_module

    def compile_to_module(graph: Any) -> Any:
        before = metrics.generated_kernel_count
        module = original(graph)
        externs = [node for node in graph.scheduler.nodes if isinstance(node, ExternKernelSchedulerNode)]
        # An operator with results of its own layout has a node for each, in addition to the call.
        calls = [node for node in externs if not isinstance(node.node, MultiOutput)]
        see(metrics.generated_kernel_count - before, len(calls), int(graph.count_bytes()[0]))
        return module

    with mock.patch.object(GraphLowering, "compile_to_module", compile_to_module):
        yield


def memory_events(profile: torch.profiler.profile) -> list[tuple[int, str, int]]:
    """Return `(nanoseconds, name, bytes)` of all events of a profile with `profile_memory=True`.

    They are in order of time. Allocations have the name "[memory]" and positive bytes, frees the
    same name and negative bytes. Bytes of other events are meaningless.
    """
    results: Any = profile.profiler
    events = results.kineto_results.events()
    return sorted((event.start_ns(), event.name(), event.nbytes()) for event in events)
