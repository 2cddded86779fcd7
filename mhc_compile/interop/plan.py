"""What a conversion will do, decided from names and shapes alone, so that a checkpoint of any size can be converted tensor by tensor."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mhc_compile.interop.tensors import convert

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from mhc_compile.interop.layout import Kind

__all__ = ["Change", "Plan", "Shapes"]

#: The entries of a state dict and their shapes.
Shapes = "Mapping[str, tuple[int, ...]]"


@dataclass(frozen=True, kw_only=True)
class Change:
    """One parameter of a hyper-connection in its other layout.

    Attributes:
        source: the entry's name in the state dict that is converted.
        target: its name in the result.
        kind: what it is.
        before: its shape.
        after: its shape in the result.
        streams: n.
        transposed: whether residual logits change places with those across the diagonal.
    """

    source: str
    target: str
    kind: Kind
    before: tuple[int, ...]
    after: tuple[int, ...]
    streams: int
    transposed: bool

    def apply(self, value: Tensor, *, native: bool) -> Tensor:
        """`value` in the other layout."""
        return convert(
            value,
            self.kind,
            streams=self.streams,
            transposed=self.transposed,
            native=native,
            scales=self.after[0] if self.after else 0,
        )

    @property
    def what(self) -> str:
        """What happens to it beyond the name, in words; "" if nothing."""
        residual = self.transposed and self.kind in ("projection", "logits")
        parts = [
            "transposed" if self.kind == "projection" else "",
            "residual logits transposed" if residual else "",
            "a_res left out, nothing reads it" if self.kind == "scales" and self.before > self.after else "",
            "a_res added, nothing reads it" if self.kind == "scales" and self.before < self.after else "",
        ]
        return ", ".join(filter(None, parts))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A conversion: every entry of `names` goes into the result, those of `changes` in their other layout, the others as they are.

    Attributes:
        preset: the system on the native side.
        spelling: whose names the native side has.
        native: whether the result is the native side.
        names: of all entries, as they are and as they will be.
        changes: by the name of the entry that is converted.
    """

    preset: str
    spelling: str
    native: bool
    names: Mapping[str, str]
    changes: Mapping[str, Change]

    def apply(self, state: Mapping[str, Any]) -> OrderedDict[str, Any]:
        """A state dict in the other layout; entries that are not converted are the same tensors."""
        result = OrderedDict((target, self.value(source, state[source])) for source, target in self.names.items())
        metadata = getattr(state, "_metadata", None)
        if metadata is not None:
            result._metadata = OrderedDict(metadata)  # type: ignore[attr-defined]
        return result

    def value(self, name: str, value: Tensor) -> Tensor:
        """What becomes of the entry `name`."""
        change = self.changes.get(name)
        return value if change is None else change.apply(value, native=self.native)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "preset": self.preset,
            "spelling": self.spelling,
            "to": self.preset if self.native else "mhc",
            "entries": len(self.names),
            "changes": [{**asdict(change), "what": change.what} for change in self.changes.values()],
        }
