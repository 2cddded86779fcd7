"""What a run gives, as data. Tables, charts and JSON read it and nothing else; torch is not imported here.

JSON (`--json FILE`) is `Result` as objects and arrays:

    {"conditions": {...}, "benchmarks": [{"kind": "site" | "step", "rounds": 15, "rows": [
        {"name": "ours", "title": "...", "status": "ok" | "missing" | "failed", "message": "why not",
         "samples":  {"forward": [s, ...], "backward": [s, ...], "total": [s, ...]},     seconds, one for each round
         "seconds":  {"forward": {"median": s, "low": s, "high": s}, ...},                quartiles
         "ratio":    {"forward": {...}, ...},            over plain, of the same rounds; {} without a plain row
         "extra":    {...} | null,                       total − plain, for each site; seconds
         "share":    0.4 | null,                         limit / total, median over rounds; not for plain
         "counters": {...} | null, "plus": {...} | null, Inductor's, of the whole graph; (this − plain) / sites
         "compile_seconds": s | null, "saved_bytes": b | null, "peak_bytes": b | null,
         "parameters": 123 | null, "loss": nats | null}]}],
     "interrupted": false}

Counters are {"kernels", "externs", "bytes"}: see `Counters`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from mhc_compile.tools.bench.spread import Spread

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["PHASES", "Benchmark", "Conditions", "Counters", "PerSite", "Result", "Row"]

PHASES = ("forward", "backward", "total")


@dataclass(frozen=True)
class Counters:
    """Of graphs that Inductor compiled, forward and backward together.

    Attributes:
        kernels: that it generated. On CPU a kernel is one parallel loop nest.
        externs: calls of operators that it did not generate.
        bytes: read and written, by its own count: every buffer once for each kernel that touches it.
    """

    kernels: int = 0
    externs: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class PerSite:
    """`(contender − plain) / sites` of the same counters."""

    kernels: float
    externs: float
    bytes: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender in one benchmark. The module's docstring says what each field is."""

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
    plus: PerSite | None = None
    compile_seconds: float | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    parameters: int | None = None
    loss: float | None = None


@dataclass(frozen=True)
class Benchmark:
    """One table. `kind`: "site" or "step"; `rounds`: complete ones."""

    kind: str
    rounds: int
    rows: tuple[Row, ...]

    def row(self, name: str) -> Row | None:
        """By name."""
        return next((row for row in self.rows if row.name == name), None)


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What it was measured under. `load`: of the machine, one minute's average, before and after; `busy`: a load of our own ran beside it."""

    device: str
    cores: int
    threads: int
    torch: str
    python: str
    packages: Mapping[str, str]
    dtype: str
    width: int
    layers: int
    tokens: int
    vocabulary: int
    streams: int
    iterations: int
    rounds: int
    busy: bool
    wait_policy: str
    load: tuple[float, float]


@dataclass(frozen=True)
class Result:
    """A run."""

    conditions: Conditions
    benchmarks: tuple[Benchmark, ...]
    interrupted: bool = False

    @property
    def failed(self) -> bool:
        """Whether a contender raised."""
        return any(row.status == "failed" for benchmark in self.benchmarks for row in benchmark.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Result:
        """The inverse of `to_dict`, also after JSON made lists of tuples."""
        conditions = Conditions(**{**data["conditions"], "load": tuple(data["conditions"]["load"])})
        benchmarks = tuple(
            Benchmark(one["kind"], one["rounds"], tuple(_row(row) for row in one["rows"])) for one in data["benchmarks"]
        )
        return cls(conditions, benchmarks, data["interrupted"])


def _row(data: Mapping[str, Any]) -> Row:
    values = {entry.name: data[entry.name] for entry in fields(Row)}
    values["samples"] = {phase: tuple(samples) for phase, samples in data["samples"].items()}
    for name in ("seconds", "ratio"):
        values[name] = {phase: Spread(**one) for phase, one in data[name].items()}
    kinds: dict[str, Any] = {"extra": Spread, "counters": Counters, "plus": PerSite}
    for name, kind in kinds.items():
        values[name] = None if data[name] is None else kind(**data[name])
    return Row(**values)
