"""Results of a run as data; tables, charts and JSON render it. Torch is not imported here.

JSON (`--json FILE`) is `Result` as objects and arrays:

    {"conditions": {...}, "benchmarks": [{"kind": "site" | "step" | "forward",
         "width": C | null, "tokens": T | null, "rounds": 15, "rows": [
        {"name": "ours", "title": "...", "status": "ok" | "missing" | "failed", "message": "why",
         "samples":  {"forward": [s, ...], "backward": [s, ...], "total": [s, ...]},   by round
         "seconds":  {"forward": {"median": s, "low": s, "high": s}, ...},             quartiles
         "ratio":    {"forward": {...}, ...},  over plain in the same rounds; {} without plain
         "extra":    {...} | null,             total − plain, for each site; seconds
         "share":    0.4 | null,               limit / total, median over rounds; null for plain
         "counters": {...} | null,             Inductor's, of the whole graph
         "plus":     {...} | null,             (this − plain) / sites
         "compile_seconds": s | null, "saved_bytes": b | null, "peak_bytes": b | null,
         "peak_ratio": 1.3 | null,             peak_bytes over plain's
         "host_seconds": s | null,             CUDA: to enqueue one run, median
         "checks": {"calls": 9, "seconds": s} | null,  of the backend, at run time, in one run
         "kernels": [{"name": "...", "launches": 1.0, "seconds": s}, ...],   CUDA, of a site
         "parameters": 123 | null, "loss": of the last step | null}]}],
     "interrupted": false}

`Counters` documents "counters" and "plus". "conditions" are the sizes of `sites.Shape`, "widths"
and "tokens" in lists, the machine (`reporting.conditions`; on CUDA with the state of the card
before and after), the versions of the packages, the rounds, the load of the machine before and
after, and how many processes compiled ("processes", 1 for the measuring one).
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, astuple, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PHASES = ("forward", "backward", "total")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return the quartiles of at least one value, interpolated between neighbours."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def paired_ratio(values: Sequence[float], base: Sequence[float]) -> Spread:
    """Return the spread of `value / base` by round, in which a disturbance of the round cancels."""
    return spread([value / one for value, one in zip(values, base, strict=True)])


def paired_difference(values: Sequence[float], base: Sequence[float]) -> Spread:
    """Return the spread of `value − base` by round."""
    return spread([value - one for value, one in zip(values, base, strict=True)])


@dataclass(frozen=True)
class Counters:
    """Counts of graphs that Inductor compiled, forward and backward together."""

    kernels: float = 0  # generated kernels. On CPU a kernel is one parallel loop nest.
    externs: float = 0  # calls of operators that it did not generate
    bytes: float = 0  # read and written, by its own count: every buffer once for each kernel that uses it

    def per_site(self, plain: Counters, sites: int) -> Counters:
        """Return `(self − plain) / sites`."""
        return Counters(*((one - other) / sites for one, other in zip(astuple(self), astuple(plain), strict=True)))


@dataclass(frozen=True)
class Checks:
    """What the backend's own Python costs in a run: which hyper-connections were computed."""

    calls: int  # of Python functions, without operators
    seconds: float  # in them and the builtins that they call, under a profiler, which makes it more


@dataclass(frozen=True)
class Kernel:
    """One kernel of a device in one run of a site, forward and backward."""

    name: str
    launches: float
    seconds: float  # of all launches


@dataclass(frozen=True, kw_only=True)
class Row:
    """One candidate in one benchmark. The docstring of this module documents the fields."""

    name: str
    title: str
    status: str
    message: str = ""
    samples: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    seconds: Mapping[str, Spread] = field(default_factory=dict)
    ratio: Mapping[str, Spread] = field(default_factory=dict)
    extra: Spread | None = None
    share: float | None = None
    counters: Counters | None = None
    plus: Counters | None = None
    compile_seconds: float | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    peak_ratio: float | None = None
    host_seconds: float | None = None
    checks: Checks | None = None
    kernels: tuple[Kernel, ...] = ()
    parameters: int | None = None
    loss: float | None = None


@dataclass(frozen=True)
class Benchmark:
    """One table: rows of kind "site", "step" or "forward", over so many complete rounds."""

    kind: str
    rounds: int
    rows: tuple[Row, ...]
    width: int | None = None  # C; None for a user's model
    tokens: int | None = None  # T; likewise


@dataclass(frozen=True)
class Result:
    """A run of the benchmark without TARGET."""

    conditions: Mapping[str, Any]
    benchmarks: tuple[Benchmark, ...]
    interrupted: bool = False

    @property
    def failed(self) -> bool:
        """Whether a candidate raised an exception."""
        return any(row.status == "failed" for benchmark in self.benchmarks for row in benchmark.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class TargetResult:
    """A run of the benchmark of a user's model."""

    target: str  # as named on the command line
    model: str  # class name
    sites: int  # number of rewritten residual adds
    train: bool  # whether training steps were timed, or else forward passes
    benchmark: Benchmark  # its rows
    torch: str  # version
    threads: int  # of torch
    load: tuple[float, float]  # of the machine, averaged over a minute, before and after
    interrupted: bool  # whether Ctrl-C ended the rounds early

    @property
    def failed(self) -> bool:
        """Whether a candidate raised an exception."""
        return any(row.status == "failed" for row in self.benchmark.rows)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: the fields, and the name of the schema."""
        return {"schema": "mhc-compile/bench-target/1", **asdict(self)}
