"""A run of the benchmark: build, compile and time every candidate, and derive the rows."""

from __future__ import annotations

import gc
import itertools
import logging
import math
import statistics
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mhc_compile import __version__
from mhc_compile._torch import show_compiler_errors_only
from mhc_compile._torch.benchmarking import caches, warm_up
from mhc_compile.reporting.conditions import gpu_state, load_average, machine_conditions
from mhc_compile.tools.bench.ahead import compile_ahead
from mhc_compile.tools.bench.builds import build
from mhc_compile.tools.bench.candidates import LIMIT, PLAIN, choose
from mhc_compile.tools.bench.limit import CopyLimit, Limit, in_step, moved
from mhc_compile.tools.bench.results import (
    PHASES,
    Benchmark,
    Counters,
    Result,
    Row,
    paired_difference,
    paired_ratio,
    spread,
)
from mhc_compile.tools.bench.timing import first_run, interleave, measure_checks, measure_kernels, measure_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from mhc_compile.reporting.progress import Silent
    from mhc_compile.tools.bench.ahead import FirstRuns
    from mhc_compile.tools.bench.candidates import Candidate
    from mhc_compile.tools.bench.sites import Shape
    from mhc_compile.tools.bench.timing import FirstRun
    from mhc_compile.tools.bench.workloads import Times, Workload

log = logging.getLogger(__name__)

_WARM_UP = 2
#: Shares of the time that is left: of a run for compilation ahead, of a benchmark for its building.
_AHEAD, _BUILDING = 0.6, 0.7


def run(
    shapes: Sequence[Shape],
    *,
    only: Sequence[str] = (),
    kinds: Sequence[str] = ("site", "step"),
    rounds: int = 15,
    cold: bool = True,
    processes: int = 1,
    seconds: float = math.inf,
    progress: Silent,
) -> Result:
    """Measure the candidates that `only` names (else the device's) in the benchmarks `kinds`.

    Args:
        shapes: sizes, which differ in width and tokens alone; each has benchmarks of its own.
        only: names of candidates.
        kinds: "site", "step" (of training), "forward" (of the model of the step, no gradients).
        rounds: of every benchmark, at most.
        cold: whether compilation starts with empty caches.
        processes: with more than one, candidates are compiled ahead in so many processes.
        seconds: for everything. What does not fit is a row that says so.
        progress: display.

    Raises:
        UnknownNameError: `only` has a name without a candidate.
    """
    end = time.monotonic() + seconds
    device = shapes[0].device
    candidates, limit = choose(only, device)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|hyper_connections|liger_kernel|tile_kernels)\.")
    show_compiler_errors_only(inductor=True)
    before, state = load_average(), gpu_state(device)
    progress.phase("loading the compiler")
    warm_up(device)
    benchmarks: list[Benchmark] = []
    ahead = processes > 1
    # Every process that compiles ahead uses the caches of this context.
    with caches(cold=True) if ahead and cold else nullcontext():
        firsts = None
        if ahead:
            until = time.monotonic() + _AHEAD * (end - time.monotonic())
            firsts = compile_ahead(candidates, kinds, shapes, processes=processes, end=until, progress=progress)
        for shape, kind in (turns := list(itertools.product(shapes, kinds))):
            share = (end - time.monotonic()) / (len(turns) - len(benchmarks))
            how: dict[str, Any] = {"limit": limit, "rounds": rounds, "cold": cold, "firsts": firsts}
            benchmark, interrupted = measure(
                kind, shape, candidates, **how, end=time.monotonic() + share, progress=progress
            )
            benchmarks.append(benchmark)
            if interrupted:
                break
    versions = {candidate.distribution: candidate.installed() for candidate in candidates}
    conditions = {
        **{name: value for name, value in asdict(shapes[0]).items() if name not in ("width", "tokens")},
        "widths": list(dict.fromkeys(shape.width for shape in shapes)),
        "tokens": list(dict.fromkeys(shape.tokens for shape in shapes)),
        **machine_conditions(device),
        "packages": {"mhc-compile": __version__, **{name: one for name, one in versions.items() if one}},
        "rounds": rounds,
        "processes": processes,
        "load": (before, load_average()),
        **({"gpu": (state, gpu_state(device))} if state else {}),
    }
    return Result(conditions, tuple(benchmarks), interrupted)


def measure(
    kind: str,
    shape: Shape,
    candidates: Sequence[Candidate],
    *,
    limit: bool,
    rounds: int,
    cold: bool,
    firsts: FirstRuns | None = None,
    end: float = math.inf,
    progress: Silent,
) -> tuple[Benchmark, bool]:
    """Measure a "site", "step" or "forward"; return the rows and whether Ctrl-C interrupted.

    `firsts` are the first runs of candidates that were compiled ahead, None for one that was not
    finished in time. After `end`, a time of `time.monotonic`, nothing begins but the first round.
    """
    torch.compiler.reset()
    gc.collect()  # models of the benchmark before
    if shape.device == "cuda":
        torch.cuda.empty_cache()
    mine = [candidate for candidate in candidates if kind in candidate.kinds]
    rows = {c.name: Row(name=c.name, title=c.title, status="missing", message=c.missing(shape) or "") for c in mine}
    ahead = {name: first for (one, size, name), first in (firsts or {}).items() if (one, size) == (kind, shape)}
    for name in rows:
        if name in ahead and ahead[name] is None:
            rows[name] = replace(rows[name], message="left out: it was not compiled in the time of --seconds")
    builds = {c.name: partial(build, kind, shape, c) for c in mine}
    until = time.monotonic() + _BUILDING * (end - time.monotonic())
    label = f"{kind}, C = {shape.width}, T = {shape.tokens}: "
    profiled = kind == "site" and shape.device == "cuda"
    workloads = prepare(
        rows, builds, label=label, cold=cold, ahead=ahead, profiled=profiled, end=until, progress=progress
    )
    if limit:
        # The bytes of a site's limit were counted by hand.
        size = sum(map(sum, moved(shape))) * shape.tokens * shape.real.itemsize
        counters = Counters(bytes=size) if kind == "site" else None
        copied = shape.device == "cuda"
        title = f"copy of the bytes{' + products' * (not copied)}" if kind == "site" else "plain + every site's limit"
        rows[LIMIT] = Row(name=LIMIT, title=title, status="ok", counters=counters)
        workloads[LIMIT] = (CopyLimit if copied else Limit)(shape, gradients=kind != "forward")
    sites = shape.sites if kind != "site" else 1
    benchmark, interrupted = time_rows(kind, rows, workloads, rounds=rounds, sites=sites, end=end, progress=progress)
    return replace(benchmark, width=shape.width, tokens=shape.tokens), interrupted


def prepare(
    rows: dict[str, Row],
    builds: Mapping[str, Callable[[], tuple[nn.Module, Workload]]],
    *,
    label: str = "",
    cold: bool,
    ahead: Mapping[str, FirstRun | None] | None = None,
    profiled: bool = False,
    end: float = math.inf,
    progress: Silent,
) -> dict[str, Workload]:
    """Build, compile and run candidates without a message; update `rows`, return what runs.

    Those that were compiled `ahead` load their code from caches. After `end` the rest is left out.
    """
    workloads: dict[str, Workload] = {}
    for index, (name, build_one) in enumerate(builds.items()):
        progress.phase(f"{label}compiling {name} ({index + 1} of {len(builds)})")
        if rows[name].message:
            continue
        if time.monotonic() > end:
            rows[name] = replace(rows[name], message="left out: the time of --seconds was over before its turn")
            continue
        try:
            torch.manual_seed(0)
            module, workload = build_one()
            first = (ahead or {}).get(name)
            if first is None:
                first = first_run(workload, cold=cold)
            workload.timed()
            memory, checks = measure_memory(workload), measure_checks(workload)
            kernels = measure_kernels(workload) if profiled else ()
        except Exception as error:  # any error of a candidate becomes its row; the others go on
            log.debug("%s failed", name, exc_info=True)
            rows[name] = replace(rows[name], status="failed", message=_line(error))
            progress.note(f"{label}{name} failed: {_line(error)}")
            continue
        workloads[name] = workload
        rows[name] = replace(
            rows[name],
            status="ok",
            counters=first.counters,
            compile_seconds=first.seconds,
            saved_bytes=memory.saved,
            peak_bytes=memory.peak,
            checks=checks,
            kernels=kernels,
            parameters=sum(parameter.numel() for parameter in module.parameters()),
        )
    return workloads


def time_rows(
    kind: str,
    rows: Mapping[str, Row],
    workloads: Mapping[str, Workload],
    *,
    rounds: int,
    sites: int,
    end: float = math.inf,
    progress: Silent,
) -> tuple[Benchmark, bool]:
    """Time the workloads; return the rows with times and whether Ctrl-C interrupted the rounds.

    A workload is a model of so many `sites`, or one site. After `end` no round but the first
    begins.
    """
    turns = itertools.count()
    progress.count(f"{kind}: timing", (rounds + _WARM_UP) * len(workloads))
    measured = interleave(workloads, rounds, _WARM_UP, lambda name: progress.advance(name, done=next(turns)), end)
    times = dict(measured.times)
    if kind != "site" and LIMIT in times:
        limits = times.pop(LIMIT)
        if PLAIN in times:
            times[LIMIT] = [in_step(plain, one, sites) for plain, one in zip(times[PLAIN], limits, strict=True)]
    filled = []
    for name, row in rows.items():
        error = measured.failures.get(name)
        if error is not None:
            progress.note(f"{kind}: {name} failed: {_line(error)}")
            filled.append(Row(name=name, title=row.title, status="failed", message=_line(error)))
        elif row.status == "ok" and not times.get(name):
            filled.append(replace(row, status="missing", message="no complete round"))
        elif row.status == "ok":
            filled.append(_timed(row, times, rows.get(PLAIN), workloads[name], sites))
        else:
            filled.append(row)
    return Benchmark(kind, measured.complete, tuple(filled)), measured.interrupted


def _timed(row: Row, times: dict[str, list[Times]], plain: Row | None, workload: Workload, sites: int) -> Row:
    samples = {phase: tuple(getattr(one, phase) for one in times[row.name]) for phase in PHASES}
    base = {phase: [getattr(one, phase) for one in times.get(PLAIN, [])] for phase in PHASES}
    # The limit is one of hyper-connections; the plain residual does less.
    floor = [one.total for one in times.get(LIMIT, [])] if row.name != PLAIN else []
    compared = bool(base["total"])
    extra = [value / sites for value in samples["total"]], [value / sites for value in base["total"]]
    return replace(
        row,
        samples=samples,
        seconds={phase: spread(values) for phase, values in samples.items()},
        ratio={phase: paired_ratio(samples[phase], base[phase]) for phase in PHASES} if compared else {},
        extra=paired_difference(*extra) if compared else None,
        share=paired_ratio(floor, samples["total"]).median if floor else None,
        peak_ratio=row.peak_bytes / plain.peak_bytes if row.peak_bytes and plain and plain.peak_bytes else None,
        host_seconds=statistics.median(one.host for one in times[row.name]) if workload.device == "cuda" else None,
        plus=row.counters.per_site(plain.counters, sites) if row.counters and plain and plain.counters else None,
        loss=getattr(workload, "loss", None),
    )


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
