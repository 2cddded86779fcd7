"""One benchmark from beginning to end: build and compile every contender, time all of them in turn, and make rows of it."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mhc_compile.tools.bench import memory
from mhc_compile.tools.bench.compiling import compiled, first_run
from mhc_compile.tools.bench.limit import Limit, in_step, moved
from mhc_compile.tools.bench.load import busy_cores
from mhc_compile.tools.bench.model import batch, parameters
from mhc_compile.tools.bench.names import LIMIT, PLAIN
from mhc_compile.tools.bench.result import PHASES, Benchmark, Counters, PerSite, Row
from mhc_compile.tools.bench.rounds import Rounds, interleave
from mhc_compile.tools.bench.spread import paired_difference, paired_ratio, spread
from mhc_compile.tools.bench.workload import SITES, SiteWorkload, StepWorkload

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mhc_compile.reporting.progress import Silent
    from mhc_compile.tools.bench.contenders import Contender
    from mhc_compile.tools.bench.shape import Shape
    from mhc_compile.tools.bench.workload import Times, Workload

__all__ = ["fill", "measure", "prepare"]

log = logging.getLogger(__name__)

_WARM_UP = 2
_LIMIT_TITLE = {"site": "copy of the bytes + products", "step": "plain + every site's limit"}


def measure(
    kind: str,
    shape: Shape,
    contenders: Sequence[Contender],
    *,
    limit: bool,
    rounds: int,
    busy: bool,
    cold: bool,
    progress: Silent,
) -> tuple[Benchmark, bool]:
    """The benchmark of a "site" or of a training "step", and whether Ctrl-C cut it short. `cold`: compile from empty caches, which takes longer."""
    torch._dynamo.reset()
    mine = [contender for contender in contenders if kind in contender.kinds]
    rows: dict[str, Row] = {}
    workloads: dict[str, Workload] = {}
    for index, contender in enumerate(mine):
        progress.phase(f"{kind}: compiling {contender.name} ({index + 1} of {len(mine)})")
        row = Row(name=contender.name, title=contender.title, status="missing", message=contender.missing(shape) or "")
        workload = None
        if not row.message:
            row, workload = prepare(row, lambda contender=contender: _workload(kind, shape, contender), cold=cold)  # type: ignore[misc]
        rows[contender.name] = row
        if workload is not None:
            workloads[contender.name] = workload
        if rows[contender.name].status == "failed":
            progress.note(f"{kind}: {contender.name} failed: {rows[contender.name].message}")
    if limit:
        rows[LIMIT] = Row(name=LIMIT, title=_LIMIT_TITLE[kind], status="ok", counters=_counted(kind, shape))
        workloads[LIMIT] = Limit(shape)
    progress.timing(kind, (rounds + _WARM_UP) * len(workloads))
    with busy_cores(busy):
        measured = interleave(workloads, rounds, _WARM_UP, progress.advance)
    for name, error in measured.failures.items():
        progress.note(f"{kind}: {name} failed: {_line(error)}")
    filled = fill(rows, workloads, measured, sites=shape.sites if kind == "step" else 1, whole=kind == "step")
    return Benchmark(kind, measured.complete, filled), measured.interrupted


def prepare(
    row: Row, build: Callable[[], tuple[torch.nn.Module, Workload]], *, cold: bool
) -> tuple[Row, Workload | None]:
    """A contender's row without times, and what is timed; None where there is nothing to time.

    Args:
        row: with name and title.
        build: makes the model and the workload that runs it.
        cold: compile from empty caches.
    """
    try:
        torch.manual_seed(0)
        module, workload = build()
        first = first_run(workload, cold=cold)
        workload.timed()
        used = memory.measure(workload)
    except Exception as error:  # whatever a contender raises is its row, and the others go on
        log.debug("%s failed", row.name, exc_info=True)
        return replace(row, status="failed", message=_line(error)), None
    ready = replace(
        row,
        status="ok",
        counters=first.counters,
        compile_seconds=first.seconds,
        saved_bytes=used.saved,
        peak_bytes=used.peak,
        parameters=parameters(module),
    )
    return ready, workload


def _workload(kind: str, shape: Shape, contender: Contender) -> tuple[torch.nn.Module, Workload]:
    if kind == "step":
        model = contender.model(shape)
        return model, StepWorkload(
            shape.device, compiled(model, contender.compiler, contender.mapping), model, batch(shape)
        )
    module, first = contender.site(shape)
    inputs = [first, *(tuple(t.detach().clone().requires_grad_() for t in first) for _ in range(SITES - 1))]
    return module, SiteWorkload(shape.device, compiled(module, contender.site_compiler), module, inputs)


def _counted(kind: str, shape: Shape) -> Counters | None:
    """The limit of a site moves what was counted by hand."""
    if kind == "step":
        return None
    return Counters(bytes=sum(part.total for part in moved(shape)) * shape.tokens * shape.real.itemsize)


def fill(
    rows: dict[str, Row], workloads: dict[str, Workload], measured: Rounds, *, sites: int, whole: bool
) -> tuple[Row, ...]:
    """The rows with their times. `whole`: of a step of `sites` sites, and not of a site alone."""
    times = dict(measured.times)
    if whole and LIMIT in times:
        if PLAIN in times:
            pairs = zip(times[PLAIN], times[LIMIT], strict=True)
            times[LIMIT] = [in_step(plain, site, sites) for plain, site in pairs]
        else:
            del times[LIMIT]
    plain_row = rows.get(PLAIN)
    filled = []
    for name, row in rows.items():
        error = measured.failures.get(name)
        if error is not None:
            filled.append(Row(name=name, title=row.title, status="failed", message=_line(error)))
        elif row.status == "ok" and not times.get(name):
            filled.append(replace(row, status="missing", message="no complete round"))
        elif row.status == "ok":
            filled.append(_timed(row, times, plain_row, workloads[name], sites))
        else:
            filled.append(row)
    return tuple(filled)


def _timed(row: Row, times: dict[str, list[Times]], plain: Row | None, workload: Workload, sites: int) -> Row:
    samples = {phase: tuple(getattr(one, phase) for one in times[row.name]) for phase in PHASES}
    base = {phase: [getattr(one, phase) for one in times.get(PLAIN, [])] for phase in PHASES}
    # The plain residual does less than the limit is the limit of.
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
        plus=_plus(row.counters, plain.counters if plain else None, sites),
        loss=getattr(workload, "loss", None),
    )


def _plus(counters: Counters | None, plain: Counters | None, sites: int) -> PerSite | None:
    if counters is None or plain is None:
        return None
    return PerSite(
        (counters.kernels - plain.kernels) / sites,
        (counters.externs - plain.externs) / sites,
        (counters.bytes - plain.bytes) / sites,
    )


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
