"""A whole run: both benchmarks with the same contenders, and what they were measured under."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from mhc_compile.tools.bench.conditions import gather, load
from mhc_compile.tools.bench.contenders import choose
from mhc_compile.tools.bench.measure import measure
from mhc_compile.tools.bench.result import Result
from mhc_compile.tools.bench.shape import Shape
from mhc_compile.tools.demo.inductor import warm_up

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mhc_compile.reporting.progress import Silent

__all__ = ["Request", "run"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asks for."""

    shape: Shape = field(default_factory=Shape)
    only: Sequence[str] = ()
    kinds: Sequence[str] = ("site", "step")
    rounds: int = 15
    threads: int | None = None
    busy: bool = False
    cold: bool = True


def run(request: Request, progress: Silent) -> Result:
    """Measures.

    Raises:
        UnknownNameError: `only` names a contender that there is not.
    """
    contenders, limit = choose(request.only)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|hyper_connections|liger_kernel|tile_kernels)\.")
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    before = load()
    progress.phase("loading the compiler")
    warm_up()  # whoever is first would pay for it
    benchmarks = []
    interrupted = False
    for kind in request.kinds:
        benchmark, interrupted = measure(
            kind,
            request.shape,
            contenders,
            limit=limit,
            rounds=request.rounds,
            busy=request.busy,
            cold=request.cold,
            progress=progress,
        )
        benchmarks.append(benchmark)
        if interrupted:
            break
    conditions = gather(
        request.shape, contenders, rounds=request.rounds, busy=request.busy, before=before, after=load()
    )
    return Result(conditions, tuple(benchmarks), interrupted)
