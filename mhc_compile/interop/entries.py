"""The parameters of one site or read-out against a layout: what both directions of a conversion have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhc_compile.errors import CheckpointError
from mhc_compile.interop.plan import Change
from mhc_compile.interop.sizes import shape_of, show, solve

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mhc_compile.interop.layout import Layout

__all__ = ["changes_from_native", "changes_to_native"]


def changes_from_native(
    members: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    layout: Layout,
    *,
    where: str,
    target: str,
    read_out: bool,
) -> list[Change]:
    """The changes of one native site or read-out into ours.

    Args:
        members: names in the state dict, by the name of the native parameter.
        shapes: of all entries of the state dict.
        layout: whose.
        where: what errors call it.
        target: template of the names in the result.
        read_out: whether it is a read-out.

    Raises:
        CheckpointError: parameters are missing, or have shapes that no number of streams gives.
    """
    entries = layout.read_out if read_out else layout.site
    letters = {part.name: part.shape for entry in entries for part in entry.native}
    sizes = _sizes(members, shapes, letters, layout, where)
    return [
        Change(
            sources=tuple(members[part.name] for part in entry.native),
            target=target.format(entry.ours),
            kind=entry.kind,
            before=tuple(shape_of(part.shape, sizes) for part in entry.native),
            after=shape_of(entry.shape, sizes),
            streams=sizes["n"],
            across=_across(entry.shape, layout),
        )
        for entry in entries
    ]


def changes_to_native(
    members: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    layout: Layout,
    *,
    where: str,
    target: str,
    read_out: bool,
) -> list[Change]:
    """The changes of one site or read-out of ours into the native ones; `members` are by our names. Otherwise as `changes_from_native`."""
    entries = layout.read_out if read_out else layout.site
    sizes = _sizes(members, shapes, {entry.ours: entry.shape for entry in entries}, layout, where)
    changes = []
    for entry in entries:
        start = 0
        for part in entry.native:
            after = shape_of(part.shape, sizes)
            changes.append(
                Change(
                    sources=(members[entry.ours],),
                    target=target.format(part.name),
                    kind=entry.kind,
                    before=(shape_of(entry.shape, sizes),),
                    after=after,
                    streams=sizes["n"],
                    part=(start, start + after[0]) if len(entry.native) > 1 else None,
                    across=_across(part.shape, layout),
                )
            )
            start += after[0]
    return changes


def _across(letters: str, layout: Layout) -> int | None:
    axes = letters.split()
    return axes.index("n(n+2)") if layout.transposed and "n(n+2)" in axes else None


def _sizes(
    members: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    letters: Mapping[str, str],
    layout: Layout,
    where: str,
) -> dict[str, int]:
    """The sizes of the letters; the parameters of a site are there, and their shapes fit, or an error is raised."""
    wanted = ", ".join(f"{name} {show(letters[name])}" for name in letters)
    missing = [name for name in letters if name not in members]
    if missing:
        raise CheckpointError(
            f"preset {layout.preset!r}: {where} has {', '.join(members)} and no {', '.join(missing)}; expected {wanted}"
        )
    pairs = {name: (letters[name], tuple(shapes[members[name]])) for name in letters}
    sizes = solve(pairs.values())
    if sizes is None:
        found = ", ".join(f"{name} {list(shape)}" for name, (_, shape) in pairs.items())
        turned = solve((axes, shape[::-1]) for axes, shape in pairs.values()) is not None
        raise CheckpointError(
            f"preset {layout.preset!r}: {where} has {found}; expected {wanted}"
            + (". They would fit if the projection were transposed" if turned else "")
        )
    told = any("n" in axis for axes in letters.values() for axis in axes.split() if axis != "nC")
    return sizes if told else {**sizes, "n": 0}
