"""Terminal rendering of a `ModelDiff`: unified, or two graphs side by side."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Group
from rich.padding import Padding
from rich.table import Column, Table
from rich.text import Text

from mhc_compile.inspection.diff.fold import Section, new_parameters, sections
from mhc_compile.inspection.diff.results import Change, ModelDiff, Row
from mhc_compile.reporting.base import render

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import RenderableType

    from mhc_compile.inspection.diff.results import GraphDiff, NodeView

#: Sign, style and legend of every kind of change.
LOOK: dict[Change, tuple[str, str, str]] = {
    Change.ADDED: ("+", "green", "added"),
    Change.REMOVED: ("-", "red", "removed"),
    Change.REPLACED: ("±", "cyan", "replaced"),
    Change.LIFTED: ("≡", "magenta", "run on all streams"),
    Change.REWIRED: ("~", "yellow", "read something else"),
    Change.MARKED: ("•", "blue", "verdict of the plan"),
    Change.SAME: (" ", "dim", "unchanged"),
}


@render.register(ModelDiff)
def _diff(diff: ModelDiff, *, side_by_side: bool = False, every: bool = False) -> RenderableType:
    """Render in one column or `side_by_side`; `every`: fold neither rows nor repeated layers."""
    parts: list[RenderableType] = [_headline(diff)]
    for graph in diff.graphs:
        if len(diff.graphs) > 1:
            parts.append(Text(f"\ngraph of {graph.title}", style="bold"))
        parts += _graph(graph, side_by_side, every)
    return Group(*parts)


def _headline(diff: ModelDiff) -> Text:
    text = Text.assemble((diff.model, "bold"), f": {diff.before} → {diff.after}")
    changes = diff.changes
    if not set(changes) - {Change.SAME}:
        text.append("\nNothing changes.", style="yellow")
        return text
    for change, (sign, style, legend) in LOOK.items():
        if changes[change]:
            text.append(f"\n{sign} ", style=style)
            text.append(f"{changes[change]} {legend}", style="dim" if change is Change.SAME else "")
    return text


def _graph(graph: GraphDiff, side_by_side: bool, every: bool) -> Iterator[RenderableType]:
    if parameters := new_parameters(graph.rows):
        yield Text()
    for new in parameters:
        sign, style, _ = LOOK[Change.ADDED]
        times = f"  × {new.count}" if new.count > 1 else ""
        shapes = ", ".join(f"{name} {value}" for name, value in new.parts)
        yield Text.assemble((f"  {sign} {new.path}{times}", style), (f"  {shapes}", "dim"))
    for section in [Section("", graph.rows)] if every else sections(graph.rows):
        if section.like:
            more = f" … {section.others[-1]} ({len(section.others) + 1} layers)" if section.others else ""
            yield Text(f"\n{section.path}{more}: as {section.like}", style="bold dim")
            continue
        yield Text()
        yield _heading(section.path, section.rows)
        if section.unchanged and not every:
            yield Padding(_folded(section.rows), (0, 0, 0, 4))
        else:
            lines = list(_lines(section, every))
            yield _columns(lines) if side_by_side else _unified(lines)


def _unified(lines: Sequence[Row | tuple[Row, ...]]) -> Table:
    grid = Table.grid(Column(width=3, justify="right"), Column(overflow="fold"), padding=(0, 1, 0, 0))
    for line in lines:
        if isinstance(line, Row):
            sign, style, _ = LOOK[line.change]
            text, note = _side(line.node, style), _note(line)
            if note:
                text.append(f"\n{note}", style=f"{style} italic")
            grid.add_row(Text(sign, style=style), text)
        else:
            grid.add_row("", _folded(line))
    return grid


def _lines(section: Section, every: bool) -> Iterator[Row | tuple[Row, ...]]:
    """Yield the changed rows one by one, and runs of two or more unchanged rows folded."""
    for same, members in groupby(_unpacked(section.rows), key=lambda row: row.change is Change.SAME):
        rows = tuple(members)
        if every or not same or len(rows) == 1:
            yield from rows
        else:
            yield rows


def _unpacked(rows: Sequence[Row]) -> Iterator[Row]:
    """Yield the rows with `pre, post, res = coefficients(...)` in the place of four."""

    def whole(row: Row) -> str:
        is_part = row.change is Change.ADDED and row.node.target == "getitem"
        return row.node.reads[0] if is_part else row.node.name

    for name, group in groupby(rows, key=whole):
        first, *parts = group
        if parts and first.change is Change.ADDED and first.node.name == name:
            names = ", ".join(part.node.name for part in parts)
            yield Row(first.change, None, replace(first.node, name=names))
        else:
            yield from (first, *parts)


def _heading(path: str, rows: Sequence[Row]) -> Text:
    if all(row.node.role == "stream" and not row.node.site for row in rows):
        begins = any(row.node.target == ".expand" for row in rows)
        return Text("where streams begin" if begins else "where streams end", style="bold")
    kinds = {row.node.kind for row in rows if row.node.module == path}
    kind = f"  {kinds.pop()}" if len(kinds) == 1 and path else ""
    return Text.assemble((path or "(the model itself)", "bold"), (kind, "dim"))


def _note(row: Row) -> str:
    """Return what the sign does not say."""
    before, after = row.before, row.after
    if before is not None and after is not None:
        if row.change is Change.REPLACED:
            return f"was {before}  {_place(before)}".rstrip()
        if row.change is Change.REWIRED:
            pairs = zip(before.reads, after.reads, strict=False)
            return ", ".join(dict.fromkeys(f"read {old}" for old, new in pairs if old != new))
        if row.change is Change.LIFTED:
            return f"was {before}  {before.value}"
    if row.change is Change.MARKED and after is not None:
        return f"becomes {after.site}" if after.role == "site" else f"skipped: {after.reason}"
    if row.change is Change.REMOVED and before is not None and before.role == "site":
        return f"part of {before.site}  {_place(before)}".rstrip()
    return ""


def _place(node: NodeView) -> str:
    file, _, line = node.source.rpartition(":")
    return f"({file.rpartition('/')[2]}:{line})" if file else ""


def _folded(rows: Sequence[Row]) -> Text:
    counts = Counter(row.node.target.rpartition(".")[2] or row.node.op for row in rows)
    listed = ", ".join(f"{name} × {count}" if count > 1 else name for name, count in counts.most_common(6))
    more = ", …" if len(counts) > 6 else ""
    return Text(f"⋯ {len(rows)} unchanged: {listed}{more}", style="dim")


def _columns(lines: Sequence[Row | tuple[Row, ...]]) -> Table:
    sides = Column(ratio=1, overflow="fold"), Column(width=1), Column(ratio=1, overflow="fold")
    table = Table(*sides, box=None, show_header=False, expand=True, padding=(0, 1, 0, 0))
    for line in lines:
        if isinstance(line, Row):
            sign, style, _ = LOOK[line.change]
            table.add_row(_side(line.before, style), Text(sign, style=style), _side(line.after, style))
        else:
            folded = _folded(line)
            table.add_row(folded, "", folded)
    return table


def _side(node: NodeView | None, style: str) -> Text:
    if node is None:
        return Text()
    return Text.assemble((str(node), "" if style == "dim" else style), (f"  {node.value}" if node.value else "", "dim"))
