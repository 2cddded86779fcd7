"""What a conversion will do, decided from names and shapes alone, so that a checkpoint of any size can be converted tensor by tensor."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mhc_compile._torch import set_state_metadata, state_metadata
from mhc_compile.errors import CheckpointError
from mhc_compile.interop.tensors import across, resized, turned

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from mhc_compile.interop.layout import Kind

__all__ = ["Change", "Plan", "plan"]


@dataclass(frozen=True, kw_only=True)
class Change:
    """One parameter of a hyper-connection in its other layout.

    Attributes:
        sources: the names of the entries that it is made of.
        target: its name in the result.
        kind: what it is.
        before: shapes of the sources.
        after: its shape in the result.
        streams: n; 0 if its shape does not tell.
        part: of a projection, the columns that it is made of; None for all.
        across: the axis of the result on which residual logits change places with those across the diagonal, None if they do not.
    """

    sources: tuple[str, ...]
    target: str
    kind: Kind
    before: tuple[tuple[int, ...], ...]
    after: tuple[int, ...]
    streams: int
    part: tuple[int, int] | None = None
    across: int | None = None

    def apply(self, values: Sequence[Tensor]) -> Tensor:
        """The parameter in its other layout, of the same dtype, from the values of `sources`."""
        value = values[0]
        if self.kind == "projection":
            value = turned(values, self.part)
        elif self.kind == "scales" and self.before[0] != self.after:
            value = resized(value, self.after[0])
        return value if self.across is None else across(value, self.streams, self.across)

    @property
    def what(self) -> str:
        """What happens to it beyond the name, in words; "" if nothing."""
        parts = [
            "" if self.part is None else f"columns {self.part[0]} to {self.part[1] - 1}",
            "joined" if len(self.sources) > 1 else "",
            "transposed" if self.kind == "projection" else "",
            "" if self.across is None else "residual i↔j",
            "a_res left out, nothing reads it" if self.kind == "scales" and self.before[0] > self.after else "",
            "a_res added, nothing reads it" if self.kind == "scales" and self.before[0] < self.after else "",
        ]
        return ", ".join(filter(None, parts))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A conversion.

    Attributes:
        preset: the system on the native side.
        spelling: whose names the native side has.
        native: whether the result is the native side.
        entries: every entry of the result, in order, and the names of those that it is made of.
        changes: by the name in the result, what does not stay as it is.
    """

    preset: str
    spelling: str
    native: bool
    entries: Mapping[str, tuple[str, ...]]
    changes: Mapping[str, Change]

    def apply(self, state: Mapping[str, Any]) -> OrderedDict[str, Any]:
        """A state dict in the other layout; entries that are not converted are the same tensors."""
        result = OrderedDict(
            (target, self.value(target, [state[source] for source in sources]))
            for target, sources in self.entries.items()
        )
        metadata = state_metadata(state)
        if metadata is not None:
            set_state_metadata(result, metadata)
        return result

    def value(self, target: str, values: Sequence[Tensor]) -> Tensor:
        """The entry `target` of the result, from the values that it is made of."""
        change = self.changes.get(target)
        return values[0] if change is None else change.apply(values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "preset": self.preset,
            "spelling": self.spelling,
            "to": self.preset if self.native else "mhc",
            "entries": len(self.entries),
            "changes": [{**asdict(change), "what": change.what} for change in self.changes.values()],
        }


def plan(names: Mapping[str, str], changes: Sequence[Change], *, preset: str, spelling: str, native: bool) -> Plan:
    """The plan of `changes`, in the order of the state dict.

    Args:
        names: every entry, and what it is called in the result if nothing happens to it.
        changes: what happens.
        preset: the system on the native side.
        spelling: whose names.
        native: whether the result is the native side.

    Raises:
        CheckpointError: two entries would get the same name, or the shapes of two tell different numbers of streams.
    """
    telling = [change for change in changes if change.streams]
    for change in telling:
        if change.streams != telling[0].streams:
            raise CheckpointError(
                f"preset {preset!r}: by their shapes, {telling[0].sources[0]} is of {telling[0].streams} streams and {change.sources[0]} of"
                f" {change.streams}; a model has as many everywhere"
            )
    made: dict[str, list[Change]] = {}
    for change in changes:
        made.setdefault(change.sources[0], []).append(change)
    used = {source for change in changes for source in change.sources}
    entries: dict[str, tuple[str, ...]] = {}
    for name, plain in names.items():
        new = [(change.target, change.sources) for change in made.get(name, ())]
        for target, sources in new if name in used else [(plain, (name,))]:
            if target in entries:
                raise CheckpointError(
                    f"preset {preset!r}: {entries[target][0]!r} and {name!r} would both become {target!r}"
                )
            entries[target] = sources
    return Plan(
        preset=preset,
        spelling=spelling,
        native=native,
        entries=entries,
        changes={change.target: change for change in changes},
    )
