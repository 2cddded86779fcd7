"""The parameters of one site or read-out, checked against a layout: what both directions of a conversion have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhc_compile.errors import CheckpointError
from mhc_compile.interop.plan import Change
from mhc_compile.interop.sizes import formula, shape_of, streams_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mhc_compile.interop.layout import Layout

__all__ = ["changes_of", "refuse_twice"]


def changes_of(
    members: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    layout: Layout,
    *,
    where: str,
    target: str,
    read_out: bool,
    native: bool,
) -> list[Change]:
    """The changes of one site or read-out.

    Args:
        members: names in the state dict, by the name that the parameter has in our layout.
        shapes: of all entries of the state dict.
        layout: of the other side.
        where: what errors call it.
        target: template of the names in the result.
        read_out: whether it is a read-out.
        native: whether the result is the native side.

    Raises:
        CheckpointError: parameters are missing, or have shapes that no number of streams gives.
    """
    entries = layout.read_out if read_out else layout.entries
    here, there = ("ours", "native") if native else ("native", "ours")
    missing = [getattr(entry, here) for entry in entries if entry.ours not in members]
    if missing:
        raise CheckpointError(
            f"preset {layout.preset!r}: {where} has no {', '.join(missing)}: it is damaged, or the hyper-connections of another kind of model"
        )
    leading = next(entry for entry in entries if entry.kind == "projection")
    projection = tuple(shapes[members[leading.ours]])
    n = streams_of(layout, projection, read_out=read_out, native=not native)
    changes = []
    for entry in entries:
        name = members[entry.ours]
        before = tuple(shapes[name])
        if n is None or before != shape_of(layout, entry.kind, n, projection, read_out=read_out, native=not native):
            turned = streams_of(layout, projection[::-1], read_out=read_out, native=not native) is not None
            raise CheckpointError(
                f"preset {layout.preset!r}: {name} has shape {list(before)}; expected"
                f" {formula(layout, entry.kind, read_out=read_out, native=not native)}"
                + (f" with n = {n}" if n is not None else "")
                + (", which it would have if it were transposed" if n is None and turned else "")
            )
        changes.append(
            Change(
                source=name,
                target=target.format(getattr(entry, there)),
                kind=entry.kind,
                before=before,
                after=shape_of(layout, entry.kind, n, projection, read_out=read_out, native=native),
                streams=n,
                transposed=layout.transposed and not read_out,
            )
        )
    return changes


def refuse_twice(names: Mapping[str, str], layout: Layout) -> None:
    """Raises CheckpointError if two entries would get the same name."""
    seen: dict[str, str] = {}
    for source, target in names.items():
        if target in seen:
            raise CheckpointError(
                f"preset {layout.preset!r}: {seen[target]!r} and {source!r} would both become {target!r}"
            )
        seen[target] = source
