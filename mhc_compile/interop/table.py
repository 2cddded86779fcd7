"""Renders a `Conversion` for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mhc_compile.interop.convert import Conversion

__all__ = ["render"]

_SHOWN = 9


def render(conversion: Conversion, *, every: bool = False) -> RenderableType:
    """What was read and written, what became of which entry (the first ones, or `every` one), and what else there was."""
    plan = conversion.plan
    direction = f"mhc to {plan.preset}" if plan.native else f"{plan.preset} to mhc"
    head = Text()
    head.append(f"{direction} ({plan.spelling!r} names)", style="bold")
    head.append(f": {conversion.source} to {conversion.out}")
    changes = list(plan.changes.values())
    table = Table(box=None, pad_edge=False, header_style="bold")
    # Names are long: what an entry becomes stands below it, so that neither is folded.
    for column in ("entry", "shape", ""):
        table.add_column(column, overflow="fold")
    for change in changes if every else changes[:_SHOWN]:
        for source, shape in zip(change.sources, change.before, strict=True):
            table.add_row(source, str(list(shape)), "")
        table.add_row(f"  {change.target}", str(list(change.after)), Text(change.what, style="dim"))
    kept = len(plan.entries) - len(changes)
    size = sum(conversion.files.values())
    lines = [
        f"... and {len(changes) - _SHOWN} more of the same kind (--all lists them)"
        if len(changes) > _SHOWN and not every
        else "",
        f"{len(changes)} entries converted, {kept} copied as they are; {len(conversion.files)} files, {size:,} bytes",
        f"copied: {', '.join(conversion.copied)}" if conversion.copied else "",
        f"left out, folders: {', '.join(conversion.left)}" if conversion.left else "",
    ]
    return Group(head, Text(), table, *(Text(line) for line in lines if line))
