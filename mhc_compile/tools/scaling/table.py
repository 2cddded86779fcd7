"""Estimates as tables: for a terminal, and as Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mhc_compile.inspection.roofline import MACHINES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from mhc_compile.tools.scaling.estimate import Estimate

__all__ = ["grid", "markdown", "render"]

#: Those of `MACHINES` that are sold.
_REAL = [place for place, machine in enumerate(MACHINES) if " alone" not in machine.name]


def markdown(estimates: Sequence[Estimate]) -> str:
    """Three tables of GitHub's Markdown."""
    return "\n\n".join(f"**{title}**\n\n{grid(rows)}" for title, rows in _tables(estimates))


def render(estimates: Sequence[Estimate]) -> RenderableType:
    """The same three for a terminal."""
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


def _tables(estimates: Sequence[Estimate]) -> list[tuple[str, list[list[str]]]]:
    return [
        ("Sizes", [["", "layers", "C", "tokens", "parameters", "active", "added", "share"], *map(_size, estimates)]),
        (
            "Bytes per token, all sites, bfloat16",
            [["", "plain adds", "floor", "as lowered", "kept, cheap", "kept, block"], *map(_bytes, estimates)],
        ),
        (
            "Expected overhead of a step: as lowered (at the floor of bytes)",
            [["", "FLOPs", *(MACHINES[i].name.removeprefix("NVIDIA ") for i in _REAL)], *map(_time, estimates)],
        ),
    ]


def _size(one: Estimate) -> list[str]:
    share = one.cost.parameters / one.parameters
    sizes = [str(one.shape.layers), str(one.shape.width), str(one.shape.tokens)]
    return [one.shape.name, *sizes, *map(_si, (one.parameters, one.active, one.cost.parameters)), f"{share:.3%}"]


def _bytes(one: Estimate) -> list[str]:
    moved = (one.cost.bytes_plain, one.cost.bytes_floor, one.cost.bytes_lowered)
    return [one.shape.name, *(f"{_si(value)}B" for value in (*moved, one.kept["cheap"], one.kept["block"]))]


def _time(one: Estimate) -> list[str]:
    shares = one.overheads
    machines = [f"{shares[i].many_tokens:.1%} ({shares[i].floor:.1%})" for i in _REAL]
    return [one.shape.name, f"{one.added.flops / one.plain.flops:.2%}", *machines]


def _si(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value < 1000 * size else f"{value / size:,.0f} {unit}"
    return f"{value:.0f} "


def grid(rows: Sequence[Sequence[str]]) -> str:
    """A table of GitHub's Markdown; the first row is the head."""
    head, *body = (f"| {' | '.join(cell.strip() for cell in row)} |" for row in rows)
    return "\n".join([head, "|---|" + "---:|" * (len(rows[0]) - 1), *body])
