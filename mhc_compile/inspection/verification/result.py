"""What `mhc_compile.check` found, as data; `table` renders it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mhc_compile.inspection.verification.comparison import Difference

__all__ = ["CheckResult", "GroupSummary", "OtherBatch", "Seconds"]


@dataclass(frozen=True)
class Seconds:
    """One forward and backward pass: of the plain model, the first one of the compiled model with its compilation, and a later one."""

    plain: float
    first: float
    compiled: float


@dataclass(frozen=True)
class OtherBatch:
    """A call with another size of the batch: that size, and how many graphs were compiled for it."""

    size: int
    recompiles: int


@dataclass(frozen=True)
class GroupSummary:
    """The tensors of one group: how many there are, how many are ok, and the one with the largest relative error."""

    group: str
    count: int
    ok: int
    worst: Difference


@dataclass(frozen=True)
class CheckResult:
    """Whether the rewritten model computes what the plain one does. Print it with rich, or read the fields.

    Attributes:
        model: class name.
        mode: "train", "eval", or "exported".
        dtype: in which it was compared, without "torch.".
        inner: the inner compiler.
        seed: of all random numbers.
        tolerance: largest relative error that needs no excuse.
        planned: sites that a dry run finds.
        sites: sites that the compiled model has.
        live: those of them that take part: with random parameters they have a gradient, or change an output when they change.
        graphs: graphs that were compiled.
        recompiles: graphs that further calls with the same shapes compiled.
        other_batch: a call with another batch size; None where the example inputs do not say what the batch is.
        own: hyper-connections that the model had already: for the live proof they have the values that they came with.
        wider: dtype of the plain model that excuses rounding; "" if none was needed, or it could not be run.
        tensors: every tensor that was compared.
        warnings: of this package, while the model was compiled and run.
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
        """Whether nothing was found."""
        return not self.findings

    @property
    def deviating(self) -> tuple[Difference, ...]:
        """The tensors that are not the same, the worst first."""
        return tuple(sorted((one for one in self.tensors if not one.ok), key=lambda one: -one.relative))

    @property
    def findings(self) -> tuple[str, ...]:
        """What is wrong, a sentence each; empty if nothing is."""
        found = []
        if not self.sites:
            found.append(
                "nothing was rewritten: the compiled model is the plain one (mhc explain shows each addition with its reason)"
            )
        elif self.sites != self.planned:
            found.append(f"{self.planned} sites were planned, and the compiled model has {self.sites}")
        for group in self.groups:
            if group.ok < group.count:
                found.append(_sentence(group))
        if self.live < self.sites:
            found.append(
                f"{self.sites - self.live} of {self.sites} sites are not live: neither gradients nor outputs depend on their parameters"
            )
        if self.recompiles:
            found.append(
                f"further calls with the same shapes compiled {self.recompiles} more graph{'s'[: self.recompiles != 1]}"
            )
        return tuple(found)

    @property
    def groups(self) -> tuple[GroupSummary, ...]:
        """The tensors by group, in the order in which they were compared."""
        grouped: dict[str, list[Difference]] = {}
        for one in self.tensors:
            grouped.setdefault(one.group, []).append(one)
        return tuple(
            GroupSummary(
                name,
                len(members),
                sum(one.ok for one in members),
                max(members, key=lambda one: (not one.ok, one.relative)),
            )
            for name, members in grouped.items()
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; errors that are not finite are None."""
        data = asdict(self)
        data["tensors"] = [one.to_dict() for one in self.tensors]
        data["warnings"] = list(self.warnings)
        return {"ok": self.ok, "findings": list(self.findings)} | data

    def __rich__(self) -> RenderableType:
        """What a rich console prints."""
        from mhc_compile.inspection.verification.table import render

        return render(self)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from mhc_compile.reporting.html import html_of

        return html_of(self)


def _sentence(group: GroupSummary) -> str:
    worst, bad = group.worst, group.count - group.ok
    error = f"{worst.relative:.1e}, allowed {worst.allowed:.0e}"
    if worst.relative == float("inf"):
        error = "missing, not finite, or of another shape or dtype"
    return f"{group.group}: {bad} of {group.count} deviate, worst {worst.name} ({error})"
