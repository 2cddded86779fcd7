"""`Plan`: what a conversion does with every entry, and the tensor operations that carry it out.

A plan needs names and shapes alone, so a checkpoint of any size is converted tensor by tensor.

phi   [n C, K]  columns pre (n), post (n), residual (n², row-major: H_res[i, j] is the weight of
                old stream j in new stream i)
fn    [K, n C]  phi transposed; if the system applies H_res = combᵀ, residual row (i, j) is our
                column (j, i)
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from mhc_compile import _torch
from mhc_compile.errors import CheckpointError
from mhc_compile.interop.layout import Part, shape_of, solve

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from mhc_compile.interop.layout import Kind, Layout

#: Value of a_res where H_res = I. Nothing reads it; this is its initial value.
UNUSED_SCALE = 0.01


@dataclass(frozen=True, kw_only=True)
class Change:
    """The conversion of one parameter of a hyper-connection; `kind` decides its operations."""

    sources: tuple[str, ...]  # the entries that it is made from
    target: str  # its name in the result
    kind: Kind
    before: tuple[tuple[int, ...], ...]  # shapes of the sources
    after: tuple[int, ...]
    streams: int  # n; 0 if the shape does not determine it
    part: tuple[int, int] | None = None  # of a projection, the range of columns; None for all
    across: int | None = None  # the axis of the result on which logits (i, j) become (j, i)

    def apply(self, values: Sequence[Tensor]) -> Tensor:
        """Return the converted parameter, in the same dtype, from the values of `sources`."""
        value = values[0]
        if self.kind == "projection":
            if self.part is not None:
                value = value[:, slice(*self.part)]
            value = torch.cat([v.t() for v in values], dim=1) if len(values) > 1 else value.t().contiguous()
        elif self.kind == "scales" and self.before[0] != self.after:
            missing = max(self.after[0] - len(value), 0)
            value = torch.cat([value[: self.after[0]], value.new_full((missing,), UNUSED_SCALE)])
        if self.across is None:
            return value
        n = self.streams
        order = [*range(2 * n), *(2 * n + j * n + i for i in range(n) for j in range(n))]
        return value.index_select(self.across, torch.tensor(order, device=value.device))

    @property
    def what(self) -> str:
        """The operations in words; "" if only the name changes."""
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
    """A conversion of a whole checkpoint."""

    preset: str  # the system on the native side
    spelling: str  # the names on the native side
    native: bool  # whether the result is the native side
    entries: Mapping[str, tuple[str, ...]]  # all of the result, in order, with their sources
    changes: Mapping[str, Change]  # those that do not stay as they are, by name in the result

    def apply(self, state: Mapping[str, Any]) -> OrderedDict[str, Any]:
        """Return the converted state dict; entries that are not converted are the same tensors."""
        result: OrderedDict[str, Any] = OrderedDict()
        for target, sources in self.entries.items():
            change = self.changes.get(target)
            values = [state[source] for source in sources]
            result[target] = values[0] if change is None else change.apply(values)
        metadata = _torch.state_metadata(state)
        if metadata is not None:
            _torch.set_state_metadata(result, metadata)
        return result

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "preset": self.preset,
            "spelling": self.spelling,
            "to": self.preset if self.native else "mhc",
            "entries": len(self.entries),
            "changes": [{**asdict(change), "what": change.what} for change in self.changes.values()],
        }


def build_plan(
    names: Mapping[str, str], changes: Sequence[Change], *, preset: str, spelling: str, native: bool
) -> Plan:
    """Return the plan of `changes` in the order of `names`, {entry: name if not converted}."""
    sized = [change for change in changes if change.streams]
    for change in sized:
        if change.streams != sized[0].streams:
            raise CheckpointError(
                f"preset {preset!r}: by their shapes, {sized[0].sources[0]} is of {sized[0].streams} streams and"
                f" {change.sources[0]} of {change.streams}; a model has as many everywhere"
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
    by_target = {change.target: change for change in changes}
    return Plan(preset=preset, spelling=spelling, native=native, entries=entries, changes=by_target)


def site_changes(
    members: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    layout: Layout,
    *,
    where: str,
    target: str,
    read_out: bool,
    native: bool,
) -> list[Change]:
    """Return the changes of one site, or of a read-out, to the native side if `native`.

    `members` are names in the state dict by parameter, `where` is the name of the site for errors,
    `target` the template of the names in the result.
    """
    moves: list[tuple[Kind, tuple[Part, ...], tuple[Part, ...]]] = []
    for entry in layout.read_out if read_out else layout.site:
        ours = (Part(entry.ours, entry.shape),)
        moves.append((entry.kind, ours, entry.native) if native else (entry.kind, entry.native, ours))
    letters = {part.name: part.shape for _, sources, _ in moves for part in sources}
    sizes = _sizes(members, shapes, letters, layout.preset, where)
    # nC alone does not determine n.
    known = any("n" in axis for axes in letters.values() for axis in axes.split() if axis != "nC")
    changes = []
    for kind, sources, results in moves:
        start = 0
        for result in results:
            after, axes = shape_of(result.shape, sizes), result.shape.split()
            changes.append(
                Change(
                    sources=tuple(members[part.name] for part in sources),
                    target=target.format(result.name),
                    kind=kind,
                    before=tuple(shape_of(part.shape, sizes) for part in sources),
                    after=after,
                    streams=sizes["n"] if known else 0,
                    part=(start, start + after[0]) if len(results) > 1 else None,
                    across=axes.index("n(n+2)") if layout.transposed and "n(n+2)" in axes else None,
                )
            )
            start += after[0]
    return changes


def _sizes(
    members: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    letters: Mapping[str, str],
    preset: str,
    where: str,
) -> dict[str, int]:
    """Return the sizes of the letters in the shapes of one site."""
    shown = {name: ", ".join(axes.split()).replace("nC", "n C") for name, axes in letters.items()}
    wanted = ", ".join(f"{name} [{axes}]" for name, axes in shown.items())
    missing = [name for name in letters if name not in members]
    if missing:
        raise CheckpointError(
            f"preset {preset!r}: {where} has {', '.join(members)} and no {', '.join(missing)}; expected {wanted}"
        )
    pairs = {name: (letters[name], tuple(shapes[members[name]])) for name in letters}
    sizes = solve(pairs.values())
    if sizes is None:
        found = ", ".join(f"{name} {list(shape)}" for name, (_, shape) in pairs.items())
        transposed = solve((axes, shape[::-1]) for axes, shape in pairs.values()) is not None
        raise CheckpointError(
            f"preset {preset!r}: {where} has {found}; expected {wanted}"
            + (". They would fit if the projection were transposed" if transposed else "")
        )
    return sizes
