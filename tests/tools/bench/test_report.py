"""Results as JSON, table and chart: renderers of the same data."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from mhc_compile.tools.bench.report import WIDE, chart, view
from mhc_compile.tools.bench.results import PHASES, Benchmark, Checks, Counters, Kernel, Result, Row, Spread

CONDITIONS = {
    "device": "A processor",
    "cores": 2,
    "threads": 2,
    "torch": "2.13.0",
    "python": "3.11",
    "packages": {"mhc-compile": "0.1.0"},
    "dtype": "float32",
    "widths": [256],
    "layers": 4,
    "tokens": [1024],
    "vocabulary": 50257,
    "streams": 4,
    "iterations": 20,
    "rounds": 3,
    "wait_policy": "passive",
    "load": (0.5, 1.5),
}


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
        plus=Counters(1.25, 0.5, 1_500_000.0),
        compile_seconds=12.5,
        saved_bytes=3_000_000,
        peak_bytes=4_000_000,
        parameters=10,
        **more,
    )


def made_up() -> Result:
    rows = (
        row("plain", 0.1),
        row("ours", 0.2, loss=5.0, checks=Checks(7, 0.0001)),
        Row(name="liger", title="Liger", status="missing", message="not installed: pip install liger-kernel"),
        Row(name="bad", title="Bad", status="failed", message="RuntimeError: no"),
    )
    return Result(CONDITIONS, tuple(Benchmark(kind, 3, rows, 256, 1024) for kind in ("site", "step", "forward")))


def test_json_has_every_field():
    result = made_up()
    data = json.loads(json.dumps(result.to_dict()))
    assert data["conditions"] == {**CONDITIONS, "load": [0.5, 1.5]}
    assert [(one["kind"], one["rounds"], len(one["rows"])) for one in data["benchmarks"]] == [
        ("site", 3, 4),
        ("step", 3, 4),
        ("forward", 3, 4),
    ]
    _, ours, missing, _ = data["benchmarks"][1]["rows"]
    assert {(one["width"], one["tokens"]) for one in data["benchmarks"]} == {(256, 1024)}
    assert ours["samples"]["forward"] == [0.2, 0.2]
    assert ours["seconds"]["total"] == {"median": 0.2, "low": 0.9 * 0.2, "high": 1.1 * 0.2}
    assert ours["ratio"]["total"]["median"] == 0.2 / 0.1
    assert (ours["extra"]["median"], ours["share"], ours["loss"]) == (0.2 - 0.1, 0.5, 5.0)
    assert ours["counters"] == {"kernels": 7, "externs": 3, "bytes": 2_000_000}
    assert ours["plus"] == {"kernels": 1.25, "externs": 0.5, "bytes": 1_500_000.0}
    assert ours["checks"] == {"calls": 7, "seconds": 0.0001}
    assert (ours["compile_seconds"], ours["saved_bytes"], ours["peak_bytes"]) == (12.5, 3_000_000, 4_000_000)
    assert (missing["status"], missing["message"]) == ("missing", "not installed: pip install liger-kernel")
    assert (missing["samples"], missing["extra"], missing["loss"]) == ({}, None, None)
    assert result.failed


@pytest.mark.parametrize("width", [80, WIDE])
def test_the_table_shows_every_row_and_cuts_nothing(width):
    out = io.StringIO()
    Console(file=out, width=width).print(view(made_up(), width))
    text = out.getvalue()
    assert "…" not in text
    assert "200 (180–220)" in text
    assert "2.00" in text
    assert "50 %" in text
    assert "7 + 3" in text  # a site: its own
    assert "1.25 + 0.5" in text  # a step: over plain
    assert "liger: not installed: pip install liger-kernel" in text
    assert "bad: RuntimeError: no" in text
    assert "run time are 7 Python calls, 0.1 ms under a profiler: 0.05" in text
    assert "A processor, 2 cores, 2 threads (passive waiting); torch 2.13.0" in text
    assert max(len(line) for line in text.splitlines() if "quartiles" not in line and "torch" not in line) <= width


def test_on_cuda_memory_over_plain_the_host_and_kernels_are_shown():
    kernels = (*(Kernel(f"kernel_{i}_" + "x" * 80, 1.0, (9 - i) * 1e-6) for i in range(9)), Kernel("fill", 2.5, 1e-7))
    on_cuda = {"peak_ratio": 1.25, "host_seconds": 0.003}
    rows = (row("ours", 0.2, kernels=kernels, **on_cuda), row("limit", 0.1, **on_cuda))
    state = {"driver_version": "580.1", "clocks.sm": "1980 MHz", "triton": "3.9.0"}
    result = Result({**CONDITIONS, "gpu": (state, state)}, (Benchmark("site", 3, rows, 2560, 4096),))
    for width in (80, WIDE):
        out = io.StringIO()
        Console(file=out, width=width).print(view(result, width))
        text = out.getvalue()
        assert "C = 2560, T = 4096; 3 rounds" in " ".join(text.split())
        assert "1.25 3.00" in " ".join(text.split())
        assert "limit: 2.0 MB a site at 0.000 TB/s" in text
        assert "ours: kernel_0_" in text
        assert "ours: 2 others" in text
        assert "before: driver_version 580.1, clocks.sm 1980 MHz, triton 3.9.0" in " ".join(text.split())
    data = json.loads(json.dumps(result.to_dict()))
    assert data["benchmarks"][0]["rows"][0]["kernels"][-1] == {"name": "fill", "launches": 2.5, "seconds": 1e-7}


def test_chart_has_a_bar_for_every_candidate_but_plain():
    site, step, forward = chart(made_up()).axes
    assert [label.get_text() for label in site.get_yticklabels()] == ["ours"]
    assert [text.get_text() for text in site.texts] == ["100.00 ms"]
    assert [text.get_text() for text in step.texts] == [text.get_text() for text in forward.texts] == ["+100 %"]
    titles = [
        f"{what}, T = 1024, median and quartiles of 3 rounds"
        for what in ("One site", "One training step", "One forward pass without gradients")
    ]
    assert [axes.get_title() for axes in (site, step, forward)] == titles


def test_chart_without_rows():
    assert len(chart(Result(CONDITIONS, (Benchmark("step", 0, ()),))).axes) == 1
