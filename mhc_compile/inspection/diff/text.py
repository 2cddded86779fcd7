"""Renders a `ModelDiff` for the terminal: unified, or two graphs side by side."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mhc_compile.inspection.diff.fold import Section, new_parameters, sections
from mhc_compile.inspection.diff.rows import Change, Row

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import RenderableType

    from mhc_compile.inspection.diff.fold import NewParameters
    from mhc_compile.inspection.diff.model_diff import GraphDiff, ModelDiff
    from mhc_compile.inspection.diff.views import NodeView

__all__ = ["LOOK", "render"]

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
#: An unchanged row is shown rather than folded where it stands alone.
_ALONE = 1


def render(diff: ModelDiff, *, side_by_side: bool = False, every: bool = False) -> RenderableType:
    """The whole diff.

    Args:
        diff: what to show.
        side_by_side: two columns instead of one.
        every: fold nothing, neither unchanged rows nor repeated layers.
    """
    parts: list[RenderableType] = [_headline(diff)]
    for graph in diff.graphs:
        if len(diff.graphs) > 1:
            parts.append(Text(f"\ngraph of {_names(graph.modules)}", style="bold"))
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
    parameters = new_parameters(graph.rows)
    if parameters:
        yield Text()
        yield from map(_parameters, parameters)
    found = [Section("", graph.rows)] if every else sections(graph.rows)
    for section in found:
        if section.like:
            yield Text(f"\n{_span(section)}: as {section.like}", style="bold dim")
        elif every or any(row.change is not Change.SAME for row in section.rows):
            yield from _section(section, side_by_side, every)
        else:
            yield Text()
            yield _heading(section.path, section.rows)
            yield Padding(_folded(section.rows), (0, 0, 0, 4))


def _section(section: Section, side_by_side: bool, every: bool) -> Iterator[RenderableType]:
    yield Text()
    yield _heading(section.path, section.rows)
    lines = list(_lines(section, every))
    if side_by_side:
        yield _columns(lines)
        return
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(width=3, justify="right")
    grid.add_column(overflow="fold")
    for line in lines:
        if isinstance(line, Row):
            sign, style, _ = LOOK[line.change]
            grid.add_row(Text(sign, style=style), _unified(line, style))
        else:
            grid.add_row("", _folded(line))
    yield grid


def _lines(section: Section, every: bool) -> Iterator[Row | tuple[Row, ...]]:
    """The rows that changed, and what lies between them: row by row, or folded."""
    for same, members in groupby(_unpacked(section.rows), key=lambda row: row.change is Change.SAME):
        rows = tuple(members)
        if every or not same or len(rows) <= _ALONE:
            yield from rows
        else:
            yield rows


def _unpacked(rows: Sequence[Row]) -> Iterator[Row]:
    """With `pre, post, res = coefficients(...)` in the place of four rows."""
    waiting: Row | None = None
    parts: list[str] = []
    for row in [*rows, None]:
        node = row.node if row is not None else None
        if (
            waiting is not None
            and row is not None
            and node is not None
            and (row.change, node.target, node.reads) == (Change.ADDED, "getitem", (waiting.node.name,))
        ):
            parts.append(node.name)
            continue
        if waiting is not None:
            yield Row(waiting.change, None, replace(waiting.node, name=", ".join(parts) or waiting.node.name))
        waiting, parts = (row, []) if row is not None and row.change is Change.ADDED else (None, [])
        if row is not None and waiting is None:
            yield row


def _heading(path: str, rows: Sequence[Row]) -> Text:
    if all(row.node.role == "stream" and not row.node.site for row in rows):
        begins = any(row.node.target == ".expand" for row in rows)
        return Text("where streams begin" if begins else "where streams end", style="bold")
    kinds = {row.node.kind for row in rows if row.node.module == path}
    kind = f"  {kinds.pop()}" if len(kinds) == 1 and path else ""
    return Text.assemble((path or "(the model itself)", "bold"), (kind, "dim"))


def _unified(row: Row, style: str) -> Text:
    text = _statement(row.node, style)
    text.append(_value(row), style="dim")
    note = _note(row)
    if note:
        text.append(f"\n{note}", style=f"{style} italic")
    return text


def _statement(node: NodeView, style: str) -> Text:
    return Text(str(node), style="" if style == "dim" else style)


def _value(row: Row) -> str:
    node = row.node
    return f"  {node.value}" if node.value else ""


def _note(row: Row) -> str:
    """What the sign does not say."""
    before, after = row.before, row.after
    if before is not None and after is not None:
        if row.change is Change.REPLACED:
            return f"was {before}  {_place(before)}".rstrip()
        if row.change is Change.REWIRED and before.reads != after.reads:
            pairs = [(old, new) for old, new in zip(before.reads, after.reads, strict=False) if old != new]
            return ", ".join(dict.fromkeys(f"read {old}" for old, _ in pairs))
        if row.change is Change.LIFTED:
            return f"was {before}  {before.value}"
    if row.change is Change.MARKED and after is not None:
        return f"becomes {after.site}" if after.role == "site" else f"left alone: {after.reason}"
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


def _parameters(parameters: NewParameters) -> Text:
    sign, style, _ = LOOK[Change.ADDED]
    shapes = ", ".join(f"{name} {value}" for name, value in parameters.parts)
    times = f"  × {parameters.count}" if parameters.count > 1 else ""
    return Text.assemble((f"  {sign} {parameters.path}{times}", style), (f"  {shapes}", "dim"))


def _columns(lines: Sequence[Row | tuple[Row, ...]]) -> Table:
    table = Table(box=None, show_header=False, expand=True, padding=(0, 1, 0, 0))
    table.add_column(ratio=1, overflow="fold")
    table.add_column(width=1)
    table.add_column(ratio=1, overflow="fold")
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
    return Text.assemble(_statement(node, style), (f"  {node.value}" if node.value else "", "dim"))


def _span(section: Section) -> str:
    paths = (section.path, *section.others)
    return paths[0] if len(paths) == 1 else f"{paths[0]} … {paths[-1]} ({len(paths)} layers)"


def _names(modules: tuple[str, ...]) -> str:
    shown = [module or "the model itself" for module in modules]
    return shown[0] if len(shown) == 1 else f"{shown[0]} and {len(shown) - 1} blocks like it"
