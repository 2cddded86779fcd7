"""A run of the benchmark: build, compile and time every candidate, and derive the rows."""

from __future__ import annotations

import itertools
import logging
import warnings
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from mhc_compile import __version__, ops
from mhc_compile._torch import compile_with_inductor, isolated_compile, show_compiler_errors_only
from mhc_compile._torch.benchmarking import warm_up
from mhc_compile.reporting.conditions import load_average, machine_conditions
from mhc_compile.tools.bench.candidates import LIMIT, PLAIN, choose
from mhc_compile.tools.bench.limit import Limit, in_step, moved
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
from mhc_compile.tools.bench.timing import first_run, interleave, measure_checks, measure_memory
from mhc_compile.tools.bench.workloads import SITES, Block, SiteWorkload, StepWorkload, batch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import nn

    from mhc_compile.reporting.progress import Silent
    from mhc_compile.tools.bench.candidates import Candidate, Compiler
    from mhc_compile.tools.bench.sites import Shape
    from mhc_compile.tools.bench.workloads import Times, Workload

log = logging.getLogger(__name__)

_WARM_UP = 2
_LIMIT_TITLE = {"site": "copy of the bytes + products", "step": "plain + every site's limit"}


def run(
    shape: Shape,
    *,
    only: Sequence[str] = (),
    kinds: Sequence[str] = ("site", "step"),
    rounds: int = 15,
    cold: bool = True,
    progress: Silent,
) -> Result:
    """Measure the candidates that `only` names (all by default) in the benchmarks `kinds`.

    Raises:
        UnknownNameError: `only` has a name without a candidate.
    """
    candidates, limit = choose(only)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|hyper_connections|liger_kernel|tile_kernels)\.")
    show_compiler_errors_only(inductor=True)
    before = load_average()
    progress.phase("loading the compiler")
    warm_up()
    benchmarks: list[Benchmark] = []
    for kind in kinds:
        benchmark, interrupted = measure(
            kind, shape, candidates, limit=limit, rounds=rounds, cold=cold, progress=progress
        )
        benchmarks.append(benchmark)
        if interrupted:
            break
    versions = {candidate.distribution: candidate.installed() for candidate in candidates}
    conditions = {
        **asdict(shape),
        **machine_conditions(shape.device),
        "packages": {"mhc-compile": __version__, **{name: one for name, one in versions.items() if one}},
        "rounds": rounds,
        "load": (before, load_average()),
    }
    return Result(conditions, tuple(benchmarks), interrupted)


def measure(
    kind: str, shape: Shape, candidates: Sequence[Candidate], *, limit: bool, rounds: int, cold: bool, progress: Silent
) -> tuple[Benchmark, bool]:
    """Measure a "site" or a training "step"; return the rows and whether Ctrl-C interrupted."""
    torch.compiler.reset()
    mine = [candidate for candidate in candidates if kind in candidate.kinds]
    rows = {c.name: Row(name=c.name, title=c.title, status="missing", message=c.missing(shape) or "") for c in mine}
    builds = {c.name: partial(_workload, kind, shape, c) for c in mine}
    workloads = prepare(rows, builds, label=f"{kind}: ", cold=cold, progress=progress)
    if limit:
        # The bytes of a site's limit were counted by hand.
        size = sum(map(sum, moved(shape))) * shape.tokens * shape.real.itemsize
        counters = Counters(bytes=size) if kind == "site" else None
        rows[LIMIT] = Row(name=LIMIT, title=_LIMIT_TITLE[kind], status="ok", counters=counters)
        workloads[LIMIT] = Limit(shape)
    sites = shape.sites if kind == "step" else 1
    return time_rows(kind, rows, workloads, rounds=rounds, sites=sites, progress=progress)


def prepare(
    rows: dict[str, Row],
    builds: Mapping[str, Callable[[], tuple[nn.Module, Workload]]],
    *,
    label: str = "",
    cold: bool,
    progress: Silent,
) -> dict[str, Workload]:
    """Build, compile and run candidates without a message; update `rows`, return what runs."""
    workloads: dict[str, Workload] = {}
    for index, (name, build) in enumerate(builds.items()):
        progress.phase(f"{label}compiling {name} ({index + 1} of {len(builds)})")
        if rows[name].message:
            continue
        try:
            torch.manual_seed(0)
            module, workload = build()
            first = first_run(workload, cold=cold)
            workload.timed()
            memory, checks = measure_memory(workload), measure_checks(workload)
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
            parameters=sum(parameter.numel() for parameter in module.parameters()),
        )
    return workloads


def compiled(module: nn.Module, compiler: Compiler, options: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """Return `module` under a candidate's compiler; compilation happens at the first call."""
    if compiler == "eager":
        return module
    if compiler.startswith("mhc"):
        recompute = compiler.removeprefix("mhc").removeprefix("-") or "cheap"
        return torch.compile(module, backend="mhc", options={"recompute": recompute, **(options or {})})
    if compiler == "blocks":
        for block in module.modules():
            if isinstance(block, Block):
                block.attn.compile()
                block.mlp.compile()
        return module
    # Isolated: the cells of all candidates share a code object, and Dynamo limits its compilations.
    return isolated_compile(module, _inductor if compiler == "operators" else "inductor")  # type: ignore[arg-type]


def _inductor(graph_module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """Compile as the backend does with a rewritten graph."""
    return compile_with_inductor(graph_module, inputs, ops.fused_decompositions(), None, {}, f"mhc-{ops.fingerprint()}")


def _workload(kind: str, shape: Shape, candidate: Candidate) -> tuple[nn.Module, Workload]:
    if kind == "step":
        model = candidate.model(shape)
        call = compiled(model, candidate.compiler, candidate.options)
        return model, StepWorkload(shape.device, call, model, batch(shape))
    module, first = candidate.site(shape)
    inputs = [first, *(tuple(t.detach().clone().requires_grad_() for t in first) for _ in range(SITES - 1))]
    return module, SiteWorkload(shape.device, compiled(module, candidate.site_compiler), module, inputs)


def time_rows(
    kind: str,
    rows: Mapping[str, Row],
    workloads: Mapping[str, Workload],
    *,
    rounds: int,
    sites: int,
    progress: Silent,
    label: str = "",
) -> tuple[Benchmark, bool]:
    """Time the workloads; return the rows with times and whether Ctrl-C interrupted the rounds.

    A workload is a model of so many `sites`, or one site. `label` replaces `kind` in the display.
    """
    turns = itertools.count()
    progress.count(f"{label or kind}: timing", (rounds + _WARM_UP) * len(workloads))
    measured = interleave(workloads, rounds, _WARM_UP, lambda name: progress.advance(name, done=next(turns)))
    times = dict(measured.times)
    if kind == "step" and LIMIT in times:
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
        plus=row.counters.per_site(plain.counters, sites) if row.counters and plain and plain.counters else None,
        loss=getattr(workload, "loss", None),
    )


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
