"""Observation of workloads: the first run, the memory of a run, and interleaved rounds."""

from __future__ import annotations

import cProfile
import math
import os
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from mhc_compile._torch.benchmarking import caches, memory_events, observe_graphs
from mhc_compile.tools.bench.results import Checks, Counters, Kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from mhc_compile.tools.bench.workloads import Times, Workload

_MARK = "mhc-bench: forward done"
_PACKAGE = Path(__file__).parents[2]


class FirstRun(NamedTuple):
    """Seconds of compilation and one run from empty caches, and counts of all compiled graphs."""

    seconds: float | None
    counters: Counters | None


def first_run(workload: Workload, *, cold: bool | None) -> FirstRun:
    """Run a workload for the first time. `cold` empties the caches of compiled code before.

    With None the caches are used as they are. Seconds are None with `cold=False`, where they mean
    nothing, and counters are None where Inductor compiled nothing.
    """
    seen: list[tuple[int, int, int]] = []
    if cold:  # loaded C++ kernels are built again, as on a new machine
        loaded = [module for name, module in sys.modules.items() if name.startswith("mhc_compile.ops.")]
        for value in [value for module in loaded for value in vars(module).values()]:
            if hasattr(value, "cache_clear"):
                value.cache_clear()
    kept = nullcontext() if cold is None else caches(cold=cold)
    with kept, observe_graphs(lambda *counts: seen.append(counts)):
        begin = time.perf_counter()
        workload.backward(workload.forward())
        workload.synchronize()
        seconds = time.perf_counter() - begin
    workload.finish()
    workload.clear()
    counters = Counters(*map(sum, zip(*seen, strict=True))) if seen else None
    return FirstRun(seconds if cold is not False and seen else None, counters)


class Memory(NamedTuple):
    """Bytes over those in use before a run: after the forward (outputs included), and at most."""

    saved: int
    peak: int


def measure_memory(workload: Workload) -> Memory:
    """Run once more, untimed; read CUDA's allocator, or on CPU the profiler's allocation events.

    Scratch memory of libraries (oneDNN, MKL, vectors of the C++ kernels) is not included.
    """
    return Memory(*(size // workload.repeats for size in (_cuda if workload.device == "cuda" else _cpu)(workload)))


def _cuda(workload: Workload) -> tuple[int, int]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = workload.forward()
    saved = torch.cuda.memory_allocated() - before
    workload.backward(outputs)
    workload.finish()
    peak = torch.cuda.max_memory_allocated() - before
    del outputs
    workload.clear()
    return saved, peak


def _cpu(workload: Workload) -> tuple[int, int]:
    with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        outputs = workload.forward()
        with record_function(_MARK):
            pass
        workload.backward(outputs)
        workload.finish()
        del outputs
        workload.clear()
    live = peak = saved = 0
    for _, name, size in memory_events(seen):
        if name == "[memory]":
            live += size
            peak = max(peak, live)
        elif name == _MARK:
            saved = live
    return saved, peak


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Discard what the profiler writes to file descriptor 2 when it starts and stops."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def measure_checks(workload: Workload) -> Checks | None:
    """Run once more under a profiler. None if no Python of this package but operators ran."""
    seen = cProfile.Profile()
    seen.runcall(lambda: workload.backward(workload.forward()))
    workload.clear()
    calls, seconds = 0, 0.0
    for entry in seen.getstats():
        if isinstance(entry.code, str) or not _checking(entry.code.co_filename):
            continue
        calls += entry.callcount
        builtins = (one.inlinetime for one in entry.calls or () if isinstance(one.code, str))
        seconds += entry.inlinetime + sum(builtins)
    return Checks(calls // workload.repeats, seconds / workload.repeats) if calls else None


def _checking(file: str) -> bool:
    """Whether a source file is of this package and not of its operators or of the benchmark."""
    path = Path(file)
    return path.is_relative_to(_PACKAGE) and path.relative_to(_PACKAGE).parts[0] not in ("mappings", "ops", "tools")


def measure_kernels(workload: Workload) -> tuple[Kernel, ...]:
    """Run forward and backward once more under torch's profiler; return what it saw, longest first.

    On CUDA these are the kernels of the device, copies and fills included, on CPU the operators.
    """
    device = "device" if workload.device == "cuda" else "cpu"
    activity = ProfilerActivity.CUDA if workload.device == "cuda" else ProfilerActivity.CPU
    with _silent_stderr(), profile(activities=[activity]) as seen:
        workload.backward(workload.forward())
        workload.synchronize()
    workload.clear()
    found = [(event, getattr(event, f"self_{device}_time_total")) for event in seen.key_averages()]
    parts = workload.repeats
    kernels = [Kernel(event.key, event.count / parts, 1e-6 * total / parts) for event, total in found if total]
    return tuple(sorted(kernels, key=lambda kernel: -kernel.seconds))


@dataclass
class Rounds:
    """Complete rounds: times by candidate, and exceptions by candidate, whose times are dropped."""

    times: dict[str, list[Times]] = field(default_factory=dict)
    failures: dict[str, BaseException] = field(default_factory=dict)
    complete: int = 0
    interrupted: bool = False


def interleave(
    workloads: Mapping[str, Workload],
    rounds: int,
    warm_up: int,
    advance: Callable[[str], None],
    end: float = math.inf,
) -> Rounds:
    """Time every workload once in each round, so that a disturbance of the machine hits all.

    `warm_up` rounds before the others do not count. The order rotates by one each round, so that no
    candidate always follows the same. `advance` is called with a name before its turn. A workload
    that raises is left out of the rounds that follow. Ctrl-C ends them and keeps the complete ones.
    After `end`, a time of `time.monotonic`, no round but the first begins.
    """
    result = Rounds({name: [] for name in workloads})
    try:
        for index in range(-warm_up, rounds):
            if result.complete and time.monotonic() > end:
                break
            names = [name for name in workloads if name not in result.failures]
            turn = index % max(1, len(names))
            measured: dict[str, Times] = {}
            for name in names[turn:] + names[:turn]:
                advance(name)
                try:
                    measured[name] = workloads[name].timed()
                except Exception as error:  # any error of a candidate becomes its row; the others go on
                    result.failures[name] = error
                    del result.times[name]
            if index >= 0:
                for name, times in measured.items():
                    result.times[name].append(times)
                result.complete = index + 1
    except KeyboardInterrupt:
        result.interrupted = True
    return result
