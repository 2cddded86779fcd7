"""Terminal rendering of a `CheckResult`: each group, the worst tensors, and the verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from mhc_compile.inspection.verification.results import CheckResult
from mhc_compile.reporting.base import fact_table, render

if TYPE_CHECKING:
    from rich.console import RenderableType

    from mhc_compile.inspection.verification.results import Difference

_WORST = 8


@render.register(CheckResult)
def _result(result: CheckResult, *, every: bool = False) -> RenderableType:
    """Render the result, with the worst tensors or with `every` one; the verdict comes last."""
    conditions = f", {result.mode}, {result.dtype}, {result.inner_backend}, seed {result.seed}"
    headline = Text.assemble((f"{result.model}: plain and rewritten", "bold"), conditions)
    groups = _table(None, "compared", "ok>", "worst>", "of")
    for group in result.groups:
        worst, counts = group.worst, f"{group.ok}/{group.count}"
        groups.add_row(group.group, counts, _number(worst), worst.name, style="" if worst.ok else "red")
    parts: list[RenderableType] = [headline, Text(), groups]
    shown = _chosen(result, every)
    if shown:
        parts += [Text(), _tensors(shown, "Tensors" if every else "Largest errors")]
    parts += [Text(), _facts(result)]
    parts += [Text(f"warning: {message}", style="yellow") for message in result.warnings]
    return Group(*parts, Text(), _verdict(result))


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
            style="" if one.ok else "red",
        )
    return table


def _chosen(result: CheckResult, every: bool) -> list[Difference]:
    if every:
        return list(result.tensors)
    bad = list(result.deviating)
    rest = sorted((one for one in result.tensors if one.ok and one.relative), key=lambda one: -one.relative)
    return bad[: 3 * _WORST] + rest[: max(_WORST - len(bad), 0)]


def _facts(result: CheckResult) -> Table:
    batch, seconds = result.other_batch, result.seconds
    more = f", {batch.recompiles} more with a batch of {batch.size}" if batch is not None else ""
    first = f"first {seconds.first:.1f} with compilation"
    notes = {
        "noise: far below the largest of its kind, and compared with that": any(one.floored for one in result.tensors),
        f"rounding: at most 4 times as far from {result.wider} as the plain model": any(
            one.excused for one in result.tensors
        ),
        "live: with the hyper-connections that the model had": result.own,
    }
    rows = [
        ("sites", f"{result.sites} of {result.planned} planned, {result.live} live"),
        ("graphs", f"{result.graphs}, {result.recompiles} more in further calls{more}"),
        ("seconds", f"plain {seconds.plain:.3f}, {first}, then {seconds.compiled:.3f}"),
        ("notes", "; ".join(note for note, holds in notes.items() if holds)),
    ]
    return fact_table(rows, style="bold")


def _verdict(result: CheckResult) -> Text:
    if result.ok:
        same = f"ok: {len(result.tensors)} tensors are the same to {result.tolerance:.0e}, {result.live} sites are live"
        return Text(same, style="green")
    lines = (Text.assemble(("not ok: ", "bold red"), (finding, "red")) for finding in result.findings)
    return Text("\n").join(lines)


def _table(title: str | None, *columns: str) -> Table:
    """Return an empty table. Columns that end with > are right-aligned; the last may be folded."""
    looks: Any = {"title_justify": "left", "title_style": "cyan", "header_style": "dim"}
    table = Table(title=title, box=None, padding=(0, 1, 0, 0), **looks)
    for name in columns:
        wrap: Any = {"overflow": "fold"} if name in {"tensor", "of"} else {"no_wrap": True}
        table.add_column(name.rstrip(">"), justify="right" if name.endswith(">") else "left", **wrap)
    return table


def _number(one: Difference) -> str:
    return f"{one.relative:.1e}" if one.relative != float("inf") else "missing"
