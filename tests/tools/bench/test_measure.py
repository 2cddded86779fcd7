"""From candidates to rows: counters, memory, failures, and what is derived from samples."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from mhc_compile._torch.benchmarking import caches, observe_graphs
from mhc_compile.reporting.progress import Silent
from mhc_compile.tools.bench.candidates import CANDIDATES, Candidate
from mhc_compile.tools.bench.measure import measure
from mhc_compile.tools.bench.sites import Shape
from mhc_compile.tools.bench.timing import measure_checks, measure_memory
from mhc_compile.tools.bench.workloads import PlainModel, StepWorkload, Workload, batch

SHAPE = Shape(width=16, layers=1, tokens=6, vocabulary=32, iterations=2)
EAGER = {
    candidate.name: dataclasses.replace(candidate, compiler="eager", site_compiler="eager") for candidate in CANDIDATES
}


def run(kind, *names, limit=True, extra=()):
    chosen = (*(EAGER[name] for name in names), *extra)
    return measure(kind, SHAPE, chosen, limit=limit, rounds=2, cold=False, progress=Silent())[0]


@pytest.mark.parametrize("kind", ["site", "step", "forward"])
def test_rows_are_derived_from_samples(kind):
    benchmark = run(kind, "plain", "deepseek-v4", "liger")
    assert [row.status for row in benchmark.rows] == ["ok", "ok", "missing", "ok"]
    plain, baseline, missing, limit = benchmark.rows
    sites = 1 if kind == "site" else SHAPE.sites
    assert benchmark.rounds == 2
    assert {len(samples) for samples in baseline.samples.values()} == {2}
    assert plain.ratio["total"].median == 1.0
    assert plain.extra.median == 0.0
    ratios = [a / b for a, b in zip(baseline.samples["total"], plain.samples["total"], strict=True)]
    assert baseline.ratio["total"].median == pytest.approx(sum(ratios) / 2)
    assert baseline.extra.low * sites <= baseline.seconds["total"].high
    assert (plain.share, limit.share) == (None, 1.0)
    assert baseline.share > 0
    assert baseline.parameters > plain.parameters
    assert (benchmark.width, benchmark.tokens) == (SHAPE.width, SHAPE.tokens)
    assert baseline.counters is None  # nothing was compiled
    assert "CUDA" in missing.message
    if kind == "forward":
        assert baseline.saved_bytes == plain.saved_bytes == 4  # the loss, and nothing for a backward
    else:
        assert baseline.saved_bytes > plain.saved_bytes
    if kind != "site":
        assert limit.seconds["total"].median > plain.seconds["total"].low
        assert (plain.loss is None) == (kind == "forward")


class Broken(Candidate):
    def sites(self, shape, count):
        raise RuntimeError("no kernel for this\nand a trace")


def test_candidate_that_raises_is_a_failed_row():
    broken = Broken(name="bad", title="bad", compiler="eager")
    plain, bad = run("step", "plain", extra=(broken,), limit=False).rows
    assert bad.status == "failed"
    assert bad.message == "RuntimeError: no kernel for this"
    assert plain.status == "ok"
    assert plain.share is None


def test_inductor_s_bytes_of_an_add_are_three_tensors():
    seen = []
    x, y = torch.randn(64, 32), torch.randn(64, 32)
    with caches(cold=False), observe_graphs(lambda *counts: seen.append(counts)):
        torch.compile(lambda a, b: a + b)(x, y)
    assert seen == [(1, 0, 3 * 64 * 32 * 4)]


def test_an_external_operator_is_one_call_and_its_results_are_counted():
    seen = []
    x, logits = torch.randn(16, 16), torch.randn(8, 4, 4)
    with caches(cold=False), observe_graphs(lambda *counts: seen.append(counts)):
        torch.compile(lambda a: torch.linalg.qr(a))(x)
        torch.compile(lambda a: torch.ops.mhc.sinkhorn(a, 3))(logits)
    assert seen == [(0, 1, 3 * 16 * 16 * 4), (0, 1, 2 * 8 * 4 * 4 * 4)]


class Squares(Workload):
    """Keeps two tensors of 64 KiB until the backward, one of them in autograd, and makes a
    third.
    """

    def __init__(self) -> None:
        super().__init__("cpu", repeats=2)
        self.layer = nn.Parameter(torch.ones(128, 128))

    def forward(self):
        doubled = self.layer * 2.0
        return doubled, doubled.square()

    def backward(self, outputs):
        torch.empty(2 * 128 * 128)
        outputs[1].sum().backward()

    def clear(self):
        self.layer.grad = None


def test_memory_after_the_forward_and_at_the_peak():
    workload = Squares()
    workload.timed()
    used = measure_memory(workload)
    one = 128 * 128 * 4
    assert used.saved == pytest.approx(2 * one / 2, abs=64)  # and a scalar
    assert used.peak >= 4 * one // 2


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 3])
def test_checks_at_run_time_are_some_calls_for_a_step_however_many_sites(layers):
    shape = dataclasses.replace(SHAPE, layers=layers)
    model = PlainModel(shape)
    options = {"inner_backend": "aot_eager"}
    for backend, expected in ((("eager", None), False), (("mhc", options), True)):
        call = torch.compile(model, backend=backend[0], options=backend[1])
        workload = StepWorkload("cpu", call, model, batch(shape))
        for _ in range(2):
            workload.timed()
        checks = measure_checks(workload)
        assert (checks is not None) == expected
    assert 2 <= checks.calls <= 10
    assert checks.seconds > 0


def test_times_are_divided_by_the_number_of_sites(monkeypatch):
    clock = iter([0.0, 2.0, 6.0, 6.0])
    workload = Squares()
    monkeypatch.setattr(workload, "_mark", lambda: next(clock))
    times = workload.timed()
    assert (times.forward, times.backward, times.total) == (1.0, 2.0, 3.0)
