"""Estimates as tables, for a terminal and as Markdown, and the generated parts of SCALING.md.

python -m mhc_compile.tools.scaling.report      writes SCALING.md
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from mhc_compile.inspection.roofline import MACHINES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from mhc_compile.tools.scaling.estimate import Estimate

PAGE, MEASURED = (Path(__file__).parent / name for name in ("SCALING.md", "measured.json"))
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
        sizes.append(
            [s.name, *map(str, (s.layers, s.width, s.tokens)), *counts, f"{cost.parameters / one.parameters:.3%}"]
        )
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


def page() -> str:
    """Return SCALING.md with its tables generated; the prose between them is written there."""
    from mhc_compile.config.options import Options
    from mhc_compile.tools.scaling.estimate import estimate
    from mhc_compile.tools.scaling.shapes import SHAPES

    options = Options().resolved
    sources = "\n".join(f"- {shape.name}: {shape.source}" for shape in SHAPES)
    estimates = (
        f"n = {options.streams}, mapping {options.mapping}; one sequence a pass, trunk and streams in bfloat16.\n\n"
        f"{markdown([estimate(shape, options) for shape in SHAPES])}\n\nSizes are from:\n\n{sources}"
    )
    text = PAGE.read_text()
    for name, content in (("estimates", estimates), ("measurements", _measurements())):
        begin, end = f"<!-- {name}: generated -->\n\n", f"\n\n<!-- end of {name} -->"
        text = text[: text.index(begin)] + begin + content + text[text.index(end) :]
    return text


def _measurements() -> str:
    measured = json.loads(MEASURED.read_text())
    head = "C|vocabulary|overhead measured|floor|as lowered|plain step measured|predicted|kept measured|predicted"
    rows = [head.split("|")]
    for one in measured:
        shares = one["measured"]
        rows.append([
            str(one["width"]),
            f"{one['conditions']['vocabulary']:,}",
            f"{shares['median']:.1%} [{shares['low']:.1%}, {shares['high']:.1%}]",
            *(f"{one[name]:.1%}" for name in ("floor", "lowered")),
            *(f"{one[name]:.2f} s" for name in ("plain_measured", "plain_predicted")),
            *(f"{one[name] / 1e6:.1f} MB" for name in ("kept_measured", "kept_predicted")),
        ])  # fmt: skip
    c = measured[0]["conditions"]
    rates, widths = ([one[name] / 1e9 for one in measured] for name in ("flops", "bandwidth"))
    loads = [load for one in measured for load in one["conditions"]["load"]]
    return (
        f"{_grid(rows)}\n\n{c['device']}, {c['threads']} thread{'s' * (c['threads'] != 1)} of {c['cores']} cores,"
        f" torch {c['torch']}, {c['dtype']}, {c['layers']} layers, {c['tokens']} tokens, {c['rounds']} rounds.\n"
        f"F = {min(rates):.0f} to {max(rates):.0f} GFLOP/s, B = {min(widths):.1f} to {max(widths):.1f} GB/s;"
        f" load of the machine {min(loads):.1f} to {max(loads):.1f}."
    )


if __name__ == "__main__":
    PAGE.write_text(page())
