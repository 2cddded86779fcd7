"""Results as JSON, table and chart: renderers of the same data."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from mhc_compile.tools.bench.chart import draw
from mhc_compile.tools.bench.result import PHASES, Benchmark, Conditions, Counters, PerSite, Result, Row
from mhc_compile.tools.bench.spread import Spread
from mhc_compile.tools.bench.table import WIDE, render

CONDITIONS = Conditions(
    device="A processor",
    cores=2,
    threads=2,
    torch="2.13.0",
    python="3.11",
    packages={"mhc-compile": "0.1.0"},
    dtype="float32",
    width=256,
    layers=4,
    tokens=1024,
    vocabulary=50257,
    streams=4,
    iterations=20,
    rounds=3,
    busy=True,
    wait_policy="passive",
    load=(0.5, 1.5),
)


def row(name, total, **more):
    seconds = {phase: Spread(total, 0.9 * total, 1.1 * total) for phase in PHASES}
    return Row(
        name=name,
        title=name,
        status="ok",
        samples=dict.fromkeys(PHASES, (total, total)),
        seconds=seconds,
        ratio={phase: Spread(total / 0.1, total / 0.1, total / 0.1) for phase in PHASES},
        extra=Spread(total - 0.1, total - 0.1, total - 0.1),
        share=0.5,
        counters=Counters(7, 3, 2_000_000),
        plus=PerSite(1.25, 0.5, 1_500_000.0),
        compile_seconds=12.5,
        saved_bytes=3_000_000,
        peak_bytes=4_000_000,
        parameters=10,
        **more,
    )


def made_up() -> Result:
    rows = (
        row("plain", 0.1),
        row("ours", 0.2, loss=5.0),
        Row(name="liger", title="Liger", status="missing", message="not installed: pip install liger-kernel"),
        Row(name="bad", title="Bad", status="failed", message="RuntimeError: no"),
    )
    return Result(CONDITIONS, (Benchmark("site", 3, rows), Benchmark("step", 3, rows)))


def test_json_and_back():
    result = made_up()
    assert Result.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    assert result.failed


@pytest.mark.parametrize("width", [80, WIDE])
def test_the_table_shows_every_row_and_cuts_nothing(width):
    out = io.StringIO()
    render(Console(file=out, width=width), made_up())
    text = out.getvalue()
    assert "…" not in text
    assert "200 (180–220)" in text
    assert "2.00" in text
    assert "50 %" in text
    assert "7 + 3" in text  # a site: its own
    assert "1.25 + 0.5" in text  # a step: over plain
    assert "liger: not installed: pip install liger-kernel" in text
    assert "bad: RuntimeError: no" in text
    assert "beside one busy process a core" in text
    assert max(len(line) for line in text.splitlines() if "quartiles" not in line and "torch" not in line) <= width


def test_the_chart_has_a_bar_for_everybody_but_plain():
    site, step = draw(made_up()).axes
    assert [label.get_text() for label in site.get_yticklabels()] == ["ours"]
    assert [text.get_text() for text in site.texts] == ["100.00 ms"]
    assert [text.get_text() for text in step.texts] == ["+100 %"]


def test_a_chart_of_nothing_is_drawn():
    assert len(draw(Result(CONDITIONS, (Benchmark("step", 0, ()),))).axes) == 1
