"""Renders a `CheckResult` for the terminal: a line for every group of tensors, the worst of them, and the verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mhc_compile.inspection.verification.comparison import Difference
    from mhc_compile.inspection.verification.result import CheckResult

__all__ = ["render"]

_WORST = 8


def render(result: CheckResult, *, every: bool = False) -> RenderableType:
    """The report: what was compared, groups, the worst tensors (`every` one, if asked), and the verdict in the last lines."""
    parts: list[RenderableType] = [_headline(result), Text(), _groups(result)]
    shown = _chosen(result, every)
    if shown:
        parts += [Text(), _tensors(shown, "Tensors" if every else "Largest errors")]
    parts += [Text(), _facts(result)]
    parts += [Text(f"warning: {message}", style="yellow") for message in result.warnings]
    return Group(*parts, Text(), _verdict(result))


def _headline(result: CheckResult) -> Text:
    text = Text()
    text.append(f"{result.model}: plain beside rewritten", style="bold")
    text.append(f", {result.mode}, {result.dtype}, {result.inner_backend}, seed {result.seed}")
    return text


def _groups(result: CheckResult) -> Table:
    table = _table()
    table.add_column("compared", no_wrap=True)
    table.add_column("ok", justify="right", no_wrap=True)
    table.add_column("worst", justify="right", no_wrap=True)
    table.add_column("of", overflow="fold")
    for group in result.groups:
        table.add_row(
            group.group, f"{group.ok}/{group.count}", _number(group.worst), group.worst.name, style=_style(group.worst)
        )
    return table


def _tensors(shown: list[Difference], title: str) -> Table:
    table = _table(title)
    table.add_column("tensor", overflow="fold")
    table.add_column("shape", no_wrap=True)
    table.add_column("largest", justify="right", no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    table.add_column("relative", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for one in shown:
        prefix = one.group.rpartition(": ")[0]
        table.add_row(
            f"{prefix}: {one.name}" if prefix else one.name,
            "×".join(map(str, one.shape)) or "scalar",
            f"{one.magnitude:.1e}",
            f"{one.absolute:.1e}" if one.absolute != float("inf") else "",
            _number(one),
            _mark(one),
            style=_style(one),
        )
    return table


def _chosen(result: CheckResult, every: bool) -> list[Difference]:
    if every:
        return list(result.tensors)
    bad = list(result.deviating)
    rest = sorted((one for one in result.tensors if one.ok and one.relative), key=lambda one: -one.relative)
    return bad[: 3 * _WORST] + rest[: max(_WORST - len(bad), 0)]


def _facts(result: CheckResult) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("sites", f"{result.sites} of {result.planned} planned, {result.live} live")
    more = f", {result.recompiles} more in further calls"
    batch = result.other_batch
    if batch is not None:
        more += f", {batch.recompiles} more with a batch of {batch.size}"
    table.add_row("graphs", f"{result.graphs}{more}")
    seconds = result.seconds
    table.add_row(
        "seconds", f"plain {seconds.plain:.3f}, first {seconds.first:.1f} with compilation, then {seconds.compiled:.3f}"
    )
    notes = []
    if any(one.floored for one in result.tensors):
        notes.append("noise: small beside the largest of its kind, and compared with that")
    if any(one.excused for one in result.tensors):
        notes.append(f"rounding: at most 4 times as far from {result.wider} as the plain model")
    if result.own:
        notes.append("live: with the hyper-connections that the model came with")
    if notes:
        table.add_row("notes", "; ".join(notes))
    return table


def _verdict(result: CheckResult) -> Text:
    if result.ok:
        return Text(
            f"ok: {len(result.tensors)} tensors are the same to {result.tolerance:.0e}, {result.live} sites are live",
            style="green",
        )
    text = Text()
    for finding in result.findings:
        text.append("not ok: ", style="bold red")
        text.append(f"{finding}\n", style="red")
    text.rstrip()
    return text


def _table(title: str | None = None) -> Table:
    return Table(
        title=title, title_justify="left", title_style="cyan", box=None, padding=(0, 1, 0, 0), header_style="dim"
    )


def _number(one: Difference) -> str:
    return f"{one.relative:.1e}" if one.relative != float("inf") else "missing"


def _mark(one: Difference) -> str:
    return "DIFFERS" if not one.ok else "rounding" if one.excused else "noise" if one.floored else ""


def _style(one: Difference) -> str:
    return "" if one.ok else "red"
