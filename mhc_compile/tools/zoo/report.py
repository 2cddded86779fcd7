"""Render outcomes as a table or as JSON."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mhc_compile.tools.zoo.check import Outcome

#: Below this width reasons are abbreviated and both errors share a column.
NARROW = 110
_STYLES = {"ok": "green", "deviates": "red", "failed": "red", "skipped": "yellow"}


def table(outcomes: Sequence[Outcome], width: int) -> Table:
    """Return a table of one row per family and mode: structure, rejections, errors."""
    narrow = width < NARROW
    view = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    view.add_column("model", no_wrap=True, overflow="ellipsis", max_width=22 if narrow else 30)
    view.add_column("mode", no_wrap=True)
    for title in ("g" if narrow else "graphs", "sites"):
        view.add_column(title, justify="right", no_wrap=True)
    view.add_column("chains", overflow="fold", max_width=12 if narrow else 18)
    view.add_column("rejected by reason", overflow="fold")
    for title in ("error",) if narrow else ("forward", "gradients"):
        view.add_column(title, justify="right", no_wrap=True)
    view.add_column("s", justify="right", no_wrap=True)
    for outcome in outcomes:
        right = outcome.sites == outcome.expected_sites
        errors = (outcome.error_forward, outcome.error_gradients)
        known = [error for error in errors if error is not None]
        shown = [_error(max(known, default=None))] if narrow else [_error(error) for error in errors]
        view.add_row(
            Text(outcome.name, style=_STYLES[outcome.status]),
            outcome.mode,
            str(outcome.graphs),
            Text(f"{outcome.sites}/{outcome.expected_sites}", style="" if right else "bold red"),
            _lengths(outcome.chains),
            _remarks(outcome),
            *shown,
            f"{outcome.seconds:.1f}",
        )
    return view


def summary(outcomes: Sequence[Outcome]) -> Text:
    """Return one line: number of outcomes by status, sites, worst error, duration."""
    counts = Counter(outcome.status for outcome in outcomes)
    text = Text(f"{len(outcomes)} checked: ")
    text.append(", ".join(f"{count} {status}" for status, count in counts.items()) or "nothing")
    rewritten, skipped = sum(o.sites for o in outcomes), sum(sum(o.rejected.values()) for o in outcomes)
    text.append(f"; {rewritten} sites rewritten, {skipped} additions skipped")
    worst = max((o.error_gradients for o in outcomes if o.error_gradients is not None), default=None)
    if worst is not None:
        text.append(f"; largest gradient error {worst:.1e}")
    text.append(f"; {sum(outcome.seconds for outcome in outcomes):.0f} s")
    text.stylize("red" if counts["deviates"] or counts["failed"] else "green")
    return text


def to_json(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return plain data: every outcome, and the number of outcomes by status."""
    return {
        "outcomes": [outcome.to_dict() for outcome in outcomes],
        "counts": dict(Counter(outcome.status for outcome in outcomes)),
    }


def listing(rows: Sequence[tuple[str, str, str, str]]) -> Table:
    """Return a table of names of families, their themes, packages, and chains at a depth."""
    view = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("family", "group", "needs", "chains"):
        view.add_column(title, no_wrap=title != "chains", overflow="fold")
    for row in rows:
        view.add_row(*map(Text, row))
    return view


def _lengths(lengths: tuple[int, ...]) -> str:
    """Return `6 + 4`, and `3×4` for three equal ones."""
    return " + ".join(f"{n}×{length}" if n > 1 else str(length) for length, n in Counter(lengths).items()) or "–"


def _remarks(outcome: Outcome) -> Text:
    """Return the skipped additions by reason, and below them the message."""
    text = Text(", ".join(f"{reason} {count}" for reason, count in outcome.rejected.most_common()) or "–")
    if outcome.message:
        text.append(f"\n{outcome.message}", style=_STYLES[outcome.status])
    return text


def _error(error: float | None) -> str:
    return "–" if error is None else "0" if error == 0 else f"{error:.0e}"
