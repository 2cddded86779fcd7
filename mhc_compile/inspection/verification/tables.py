"""Terminal rendering of a `CheckResult`: each group, the worst tensors, and the verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from mhc_compile.inspection.verification.results import CheckResult
from mhc_compile.reporting.base import render

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mhc_compile.inspection.verification.results import Difference

__all__: list[str] = []

_WORST = 8


@render.register(CheckResult)
def _result(result: CheckResult, *, every: bool = False) -> RenderableType:
    """Render the result, with the worst tensors or with `every` one; the verdict comes last."""
    parts: list[RenderableType] = [_headline(result), Text(), _groups(result)]
    shown = _chosen(result, every)
    if shown:
        parts += [Text(), _tensors(shown, "Tensors" if every else "Largest errors")]
    parts += [Text(), _facts(result)]
    parts += [Text(f"warning: {message}", style="yellow") for message in result.warnings]
    return Group(*parts, Text(), _verdict(result))


def _headline(result: CheckResult) -> Text:
    conditions = f", {result.mode}, {result.dtype}, {result.inner_backend}, seed {result.seed}"
    return Text.assemble((f"{result.model}: plain and rewritten", "bold"), conditions)


def _groups(result: CheckResult) -> Table:
    table = _table(None, "compared", "ok>", "worst>", "of")
    for group in result.groups:
        worst = group.worst
        counts = f"{group.ok}/{group.count}"
        table.add_row(group.group, counts, _number(worst), worst.name, style=_style(worst))
    return table


def _tensors(shown: list[Difference], title: str) -> Table:
    table = _table(title, "tensor", "shape", "largest>", "error>", "relative>", "")
    for one in shown:
        prefix = one.group.rpartition(": ")[0]
        table.add_row(
            f"{prefix}: {one.name}" if prefix else one.name,
            "×".join(map(str, one.shape)) or "scalar",
            f"{one.magnitude:.1e}",
            f"{one.absolute:.1e}" if one.absolute != float("inf") else "",
            _number(one),
            "DIFFERS" if not one.ok else "rounding" if one.excused else "noise" if one.floored else "",
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
    batch = result.other_batch
    more = f", {batch.recompiles} more with a batch of {batch.size}" if batch is not None else ""
    table.add_row("graphs", f"{result.graphs}, {result.recompiles} more in further calls{more}")
    plain, first, compiled = result.seconds.plain, result.seconds.first, result.seconds.compiled
    table.add_row("seconds", f"plain {plain:.3f}, first {first:.1f} with compilation, then {compiled:.3f}")
    notes = []
    if any(one.floored for one in result.tensors):
        notes.append("noise: far below the largest of its kind, and compared with that")
    if any(one.excused for one in result.tensors):
        notes.append(f"rounding: at most 4 times as far from {result.wider} as the plain model")
    if result.own:
        notes.append("live: with the hyper-connections that the model had")
    if notes:
        table.add_row("notes", "; ".join(notes))
    return table


def _verdict(result: CheckResult) -> Text:
    if result.ok:
        same = f"ok: {len(result.tensors)} tensors are the same to {result.tolerance:.0e}, {result.live} sites are live"
        return Text(same, style="green")
    text = Text()
    for finding in result.findings:
        text.append("not ok: ", style="bold red")
        text.append(f"{finding}\n", style="red")
    text.rstrip()
    return text


def _table(title: str | None, *columns: str) -> Table:
    """Return an empty table. Columns that end with > are right-aligned; the last may be folded."""
    table = Table(
        title=title, title_justify="left", title_style="cyan", box=None, padding=(0, 1, 0, 0), header_style="dim"
    )
    for name in columns:
        folded = name in {"tensor", "of"}
        table.add_column(
            name.rstrip(">"),
            justify="right" if name.endswith(">") else "left",
            no_wrap=not folded,
            overflow="fold" if folded else "ellipsis",
        )
    return table


def _number(one: Difference) -> str:
    return f"{one.relative:.1e}" if one.relative != float("inf") else "missing"


def _style(one: Difference) -> str:
    return "" if one.ok else "red"
