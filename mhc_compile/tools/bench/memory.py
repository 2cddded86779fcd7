"""Memory of one step over what is there before it: the peak, and what lies between forward and backward."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from mhc_compile._torch.benchmarking import memory_events

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mhc_compile.tools.bench.workload import Workload

__all__ = ["Memory", "measure"]

_MARK = "mhc-bench: forward done"


@dataclass(frozen=True)
class Memory:
    """Bytes, for one of several sites or for a step.

    Attributes:
        saved: alive after the forward, its outputs among them.
        peak: the most at any time up to the end.
    """

    saved: int
    peak: int


def measure(workload: Workload) -> Memory:
    """Of one more run, not timed. On CUDA the allocator knows; on CPU the profiler sees every allocation, those of compiled code too.

    Scratch memory that libraries allocate by themselves (oneDNN, MKL, the vectors of our C++ kernels) is seen by neither.
    """
    saved, peak = _cuda(workload) if workload.device == "cuda" else _cpu(workload)
    return Memory(saved // workload.repeats, peak // workload.repeats)


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
    with _no_chatter(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
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
def _no_chatter() -> Iterator[None]:
    """The profiler announces its start and stop on the standard error of the process, past Python."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
