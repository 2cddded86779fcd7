"""Estimates as tables, for a terminal and as Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhc_compile.inspection.roofline import MACHINES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from mhc_compile.tools.scaling.estimate import Estimate

#: Those of `MACHINES` that are sold.
_REAL = [place for place, machine in enumerate(MACHINES) if " alone" not in machine.name]
_Table = tuple[str, list[list[str]]]


def markdown(estimates: Sequence[Estimate]) -> str:
    """Return three tables of GitHub's Markdown."""
    return "\n\n".join(f"**{title}**\n\n{_grid(rows)}" for title, rows in _tables(estimates))


def view(estimates: Sequence[Estimate]) -> RenderableType:
    """Return the same tables for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    for title, (head, *body) in _tables(estimates):
        table = Table(title=title, title_justify="left", title_style="cyan", box=None, padding=(0, 1, 0, 0))
        for place, name in enumerate(head):
            table.add_column(name, justify="left" if place == 0 else "right", overflow="fold")
        for row in body:
            table.add_row(*row)
        parts += [table, Text()]
    return Group(*parts[:-1])


def _tables(estimates: Sequence[Estimate]) -> tuple[_Table, ...]:
    sizes = [["", "layers", "C", "tokens", "parameters", "active", "added", "share"]]
    moved = [["", "plain adds", "floor", "as lowered", "kept, cheap", "kept, block"]]
    times = [["", "FLOPs", *(MACHINES[i].name.removeprefix("NVIDIA ") for i in _REAL)]]
    for one in estimates:
        s, cost, shares = one.shape, one.cost, one.overheads
        counts = map(_si, (one.parameters, one.active, cost.parameters))
        share = f"{cost.parameters / one.parameters:.3%}"
        sizes.append([s.name, *map(str, (s.layers, s.width, s.tokens)), *counts, share])
        amounts = (cost.bytes_plain, cost.bytes_floor, cost.bytes_lowered, one.kept["cheap"], one.kept["block"])
        moved.append([s.name, *(f"{_si(amount)}B" for amount in amounts)])
        machines = [f"{shares[i].many_tokens:.1%} ({shares[i].floor:.1%})" for i in _REAL]
        times.append([s.name, f"{one.added.flops / one.plain.flops:.2%}", *machines])
    return (
        ("Sizes", sizes),
        ("Bytes per token, all sites, bfloat16", moved),
        ("Expected overhead of a step: as lowered (at the floor of bytes)", times),
    )


def _si(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 1000 * size else f"{value / size:,.0f} {unit}"
    return f"{value:.0f} "


def _grid(rows: Sequence[Sequence[str]]) -> str:
    head, *body = (f"| {' | '.join(cell.strip() for cell in row)} |" for row in rows)
    return "\n".join([head, "|---|" + "---:|" * (len(rows[0]) - 1), *body])
