"""The compiler that a contender asks for, and what Inductor counts while it works."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mhc_compile._torch import isolated_compile
from mhc_compile._torch.benchmarking import caches, observe_graphs
from mhc_compile.tools.bench import ours
from mhc_compile.tools.bench.model import Block
from mhc_compile.tools.bench.result import Counters

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from mhc_compile.tools.bench.contenders import Compiler
    from mhc_compile.tools.bench.workload import Workload

__all__ = ["Compiled", "compiled", "first_run"]


def compiled(module: nn.Module, compiler: Compiler, mapping: str = "sinkhorn") -> Callable[..., Any]:
    """`module` under a contender's compiler, ours with this mapping; nothing is compiled before the first call."""
    if compiler == "eager":
        return module
    if compiler.startswith("mhc"):
        recompute = compiler.removeprefix("mhc").removeprefix("-") or "cheap"
        return torch.compile(module, backend="mhc", options={"recompute": recompute, "mapping": mapping})
    if compiler == "operators":
        return isolated_compile(module, ours.inductor)
    if compiler == "blocks":
        for block in module.modules():
            if isinstance(block, Block):
                block.attn.compile()
                block.mlp.compile()
        return module
    # Isolated: the cells of all contenders share one code object, and Dynamo compiles that so many times only.
    return isolated_compile(module, "inductor")  # type: ignore[arg-type]


@dataclass(frozen=True)
class Compiled:
    """What the first forward and backward told.

    Attributes:
        seconds: of that first forward and backward, with empty caches, one run included; None where the caches were not emptied.
        counters: of everything that Inductor compiled in it; None where it compiled nothing.
    """

    seconds: float | None
    counters: Counters | None


def first_run(workload: Workload, *, cold: bool) -> Compiled:
    """Runs a workload for the first time, and ends its first round. `cold` empties the caches of compiled code before."""
    seen: list[tuple[int, int, int]] = []
    if cold:
        ours.forget_kernels()
    with caches(cold=cold), observe_graphs(lambda *counts: seen.append(counts)):
        begin = time.perf_counter()
        workload.backward(workload.forward())
        workload.synchronize()
        seconds = time.perf_counter() - begin
    workload.finish()
    workload.clear()
    if not seen:
        return Compiled(None, None)
    return Compiled(seconds if cold else None, Counters(*(sum(column) for column in zip(*seen, strict=True))))
