"""Compilation in processes of their own, and the time that a run may take."""

from __future__ import annotations

import dataclasses
import math
import time

import pytest
import torch

from mhc_compile.reporting.progress import Silent
from mhc_compile.tools.bench.ahead import compile_ahead
from mhc_compile.tools.bench.candidates import CANDIDATES
from mhc_compile.tools.bench.measure import measure, run
from mhc_compile.tools.bench.sites import Shape

SHAPE = Shape(width=16, layers=1, tokens=6, vocabulary=32, iterations=2)
PLAIN, OURS = (one for one in CANDIDATES if one.name in ("plain", "ours"))
EAGER = dataclasses.replace(PLAIN, compiler="eager", site_compiler="eager")


def ahead(*candidates, end=math.inf, shape=SHAPE, progress=None):
    return compile_ahead(candidates, ("site",), (shape,), processes=2, end=end, progress=progress or Silent())


def test_what_was_not_compiled_in_time_is_a_row_that_says_so():
    firsts = ahead(PLAIN, OURS, end=time.monotonic())
    assert firsts == {("site", SHAPE, "plain"): None, ("site", SHAPE, "ours"): None}
    how = {"limit": False, "rounds": 1, "cold": False, "progress": Silent()}
    (row,) = measure("site", SHAPE, (EAGER,), firsts=firsts, **how)[0].rows
    assert row.status == "missing"
    assert "--seconds" in row.message


def test_what_has_no_turn_in_time_is_a_row_that_says_so():
    how = {"limit": False, "rounds": 1, "cold": False, "progress": Silent()}
    (row,) = measure("site", SHAPE, (EAGER,), end=time.monotonic() - 1, **how)[0].rows
    assert (row.status, "before its turn" in row.message) == ("missing", True)


@pytest.mark.slow
def test_a_process_that_fails_leaves_the_error_to_the_measurement():
    notes = []
    silent = Silent()
    silent.note = notes.append
    wrong = dataclasses.replace(SHAPE, dtype="nothing")
    assert ahead(PLAIN, shape=wrong, progress=silent) == {}
    assert notes == [
        "plain, C = 16, T = 6: failed in its process, is compiled again here: AttributeError: module 'torch' has no attribute 'nothing'"
    ]


@pytest.mark.slow
def test_the_measuring_process_loads_what_the_others_compiled():
    torch._dynamo.utils.counters.clear()
    shapes = [SHAPE, dataclasses.replace(SHAPE, width=24)]
    result = run(shapes, only=["ours"], kinds=("site", "step"), rounds=1, processes=2, progress=Silent())
    assert [(one.kind, one.width) for one in result.benchmarks] == [
        (kind, width) for width in (16, 24) for kind in ("site", "step")
    ]
    for benchmark in result.benchmarks:
        assert [(row.name, row.status) for row in benchmark.rows] == [("plain", "ok"), ("ours", "ok")]
        assert all(row.compile_seconds > 0 for row in benchmark.rows)
        assert all(row.counters.bytes > 0 for row in benchmark.rows)
    counters = torch._dynamo.utils.counters
    assert counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"] >= 8
    assert counters["inductor"]["fxgraph_cache_miss"] <= 2  # the function that loads the compiler
