"""Progress displays: which one is chosen, and what each shows."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mhc_compile.reporting.progress import Bars, Lines, Silent, choose_progress


@pytest.mark.parametrize(
    ("terminal", "quiet", "kind"), [(True, False, Bars), (False, False, Lines), (True, True, Silent)]
)
def test_display_follows_the_console(terminal, quiet, kind):
    console = Console(file=io.StringIO(), force_terminal=terminal)
    with choose_progress(console, quiet=quiet) as progress:
        assert type(progress) is kind


def shown(*, terminal: bool) -> str:
    out = io.StringIO()
    with choose_progress(Console(file=out, force_terminal=terminal, width=80), quiet=False) as progress:
        progress.phase("compiling plain")
        progress.note("plain: [failed]")
        progress.log("step 3: loss 2.0")
        progress.count("training", total=8, done=3)
        progress.advance("loss 1.9")
        progress.advance(done=8)
    return out.getvalue()


def test_lines_report_phases_and_not_every_unit():
    assert shown(terminal=False).splitlines() == [
        "compiling plain",
        "plain: [failed]",
        "step 3: loss 2.0",
        "training, 3 of 8 done",
    ]


def test_bar_counts_units_and_keeps_notes():
    text = shown(terminal=True)
    for part in ("compiling plain", "plain: [failed]", "training loss 1.9", "4/8", "8/8"):
        assert part in text
    assert "step 3" not in text
