"""The result of `mhc_compile.check`, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mhc_compile.reporting.base import Renderable, counted, finite

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Difference:
    """One tensor, in the plain model and in the rewritten one.

    `group` is "outputs", "written inputs", "buffers", "gradients", "input gradients", or one of
    these with the prefix of a further comparison ("live: gradients"). `relative` is `absolute` over
    `magnitude`, or over the floor of the group if that is larger; inf where one side lacks the
    value, has another shape or dtype, or is not finite elsewhere.

    `floored`: the magnitude is below the floor, so that the tensor may be rounding noise of the
    group. (Below 1e-5 of the largest entry of the group, or the tolerance if that is less, it is;
    then the largest entry is its magnitude.) `excused`: `relative` exceeds the tolerance, and the
    plain model rounds as much: compared with the model in a wider dtype, the rewritten one errs at
    most 4 times as much as the plain one, or as the median of the plain one's group.
    """

    group: str
    name: str  #: path of the parameter or buffer, or of the value in the inputs or outputs
    shape: tuple[int, ...]
    dtype: str  #: without "torch."
    magnitude: float  #: largest absolute entry in the plain model
    absolute: float  #: largest absolute error
    relative: float
    allowed: float  #: largest `relative` that is ok
    floored: bool = False
    excused: bool = False

    @property
    def ok(self) -> bool:
        """Whether both sides agree."""
        return self.excused or self.relative <= self.allowed

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; numbers that are not finite are None."""
        return {**finite(asdict(self)), "ok": self.ok}


@dataclass(frozen=True)
class Seconds:
    """Time of a forward and backward pass: plain, compiled the first time, and compiled later."""

    plain: float
    first: float
    compiled: float


@dataclass(frozen=True)
class OtherBatch:
    """A call with another batch size: the size, and the number of graphs compiled for it."""

    size: int
    recompiles: int


@dataclass(frozen=True)
class GroupSummary:
    """The tensors of one group: their number, how many are ok, and the worst."""

    group: str
    count: int
    ok: int
    worst: Difference


@dataclass(frozen=True)
class CheckResult(Renderable):
    """Result of `mhc_compile.check`. Print it with rich, or read the fields.

    Attributes:
        model: class name.
        mode: "train", "eval", or "exported".
        dtype: dtype of the comparison, without "torch.".
        inner_backend: the inner compiler.
        seed: of all random numbers.
        tolerance: largest relative error that needs no excuse.
        planned: sites that a dry run finds.
        sites: sites of the compiled model.
        live: those that take part: with random parameters they have a gradient, or change an output
            when they change.
        missed: sites that were not computed in each of two further calls, by path: how often they
            were. A block that is called several times in each call computes its sites as often.
        graphs: graphs that were compiled.
        recompiles: graphs that further calls with the same shapes compiled.
        other_batch: a call with another batch size; None if the inputs do not show the size.
        own: the model had hyper-connections already; the live comparison uses their values.
        wider: dtype of the plain model that excuses rounding; "" if not needed or impossible.
        tensors: every tensor that was compared.
        warnings: warnings of this package while the model was compiled and run.
        seconds: see `Seconds`.
    """

    model: str
    mode: str
    dtype: str
    inner_backend: str
    seed: int
    tolerance: float
    planned: int
    sites: int
    live: int
    missed: Mapping[str, int]
    graphs: int
    recompiles: int
    other_batch: OtherBatch | None
    own: bool
    wider: str
    tensors: tuple[Difference, ...]
    warnings: tuple[str, ...]
    seconds: Seconds

    @property
    def ok(self) -> bool:
        """Whether there are no findings."""
        return not self.findings

    @property
    def deviating(self) -> tuple[Difference, ...]:
        """The tensors that differ, the worst first."""
        return tuple(sorted((one for one in self.tensors if not one.ok), key=lambda one: -one.relative))

    @property
    def findings(self) -> tuple[str, ...]:
        """What is wrong, a sentence each."""
        found = []
        if not self.sites:
            found.append(
                "nothing was rewritten: the compiled model is the plain one (mhc explain shows each addition with its"
                " reason)"
            )
        elif self.sites != self.planned:
            found.append(f"{self.planned} sites were planned, and the compiled model has {self.sites}")
        for group in self.groups:
            worst, bad = group.worst, group.count - group.ok
            error = f"{worst.relative:.1e}, allowed {worst.allowed:.0e}"
            if worst.relative == float("inf"):
                error = "missing, not finite, or of another shape or dtype"
            if bad:
                found.append(f"{group.group}: {bad} of {group.count} deviate, worst {worst.name} ({error})")
        if self.live < self.sites:
            found.append(
                f"{self.sites - self.live} of {self.sites} sites are not live: neither gradients nor outputs depend on"
                " their parameters"
            )
        if self.missed:
            path, number = next(iter(self.missed.items()))
            found.append(
                f"{len(self.missed)} of {self.sites} sites are not computed in each call: {path} {number} times in 2 calls"
            )
        if self.recompiles:
            found.append(f"further calls with the same shapes compiled {counted(self.recompiles, 'more graph')}")
        return tuple(found)

    @property
    def groups(self) -> tuple[GroupSummary, ...]:
        """The tensors by group, in the order of their comparison."""
        grouped: dict[str, list[Difference]] = {}
        for one in self.tensors:
            grouped.setdefault(one.group, []).append(one)
        return tuple(
            GroupSummary(
                name, len(all_), sum(one.ok for one in all_), max(all_, key=lambda one: (not one.ok, one.relative))
            )
            for name, all_ in grouped.items()
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; errors that are not finite are None."""
        more = {"tensors": [one.to_dict() for one in self.tensors]}
        return {"ok": self.ok, "findings": list(self.findings), **finite(asdict(self)), **more}
