"""Rounds: every candidate once in each, in turn, and a failure ends one candidate alone."""

from __future__ import annotations

import time

import torch

from mhc_compile.tools.bench.timing import interleave, measure_kernels
from mhc_compile.tools.bench.workloads import Times, Workload


class Counting(Workload):
    def __init__(self, raises_at: int | None = None, error: BaseException | None = None) -> None:
        super().__init__("cpu")
        self.calls, self.raises_at, self.error = 0, raises_at, error

    def timed(self) -> Times:
        self.calls += 1
        if self.calls == self.raises_at:
            raise self.error or RuntimeError("broken")
        return Times(self.calls, 0.0, self.calls)


def test_warm_up_rounds_do_not_count_and_the_order_turns():
    turns: list[str] = []
    measured = interleave({name: Counting() for name in "abc"}, 3, 2, turns.append)
    rounds = ["".join(turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert len(rounds) == 5
    assert rounds[2:] == ["abc", "bca", "cab"]
    assert measured.complete == 3
    assert [times.total for times in measured.times["a"]] == [3, 4, 5]


def test_failing_candidate_is_dropped():
    broken = Counting(raises_at=3)
    measured = interleave({"good": Counting(), "broken": broken}, 4, 1, lambda name: None)
    assert len(measured.times["good"]) == 4
    assert "broken" not in measured.times
    assert str(measured.failures["broken"]) == "broken"
    assert broken.calls == 3


def test_interrupt_keeps_complete_rounds_only():
    interrupting = Counting(raises_at=3, error=KeyboardInterrupt())
    measured = interleave({"first": Counting(), "second": interrupting}, 5, 0, lambda name: None)
    assert measured.interrupted
    assert measured.complete == 2
    assert {len(times) for times in measured.times.values()} == {2}


def test_no_candidates():
    assert interleave({}, 2, 1, lambda name: None).times == {}


def test_after_the_end_no_round_but_the_first_begins():
    measured = interleave({"a": Counting()}, 9, 1, lambda name: None, end=time.monotonic() - 1)
    assert (measured.complete, len(measured.times["a"])) == (1, 1)


def test_kernels_of_a_run_are_counted_for_one_site():
    class Products(Workload):
        def forward(self):
            return [torch.ones(8, 8) @ torch.ones(8, 8) for _ in range(6)]

        def backward(self, outputs):
            del outputs

    found = measure_kernels(Products("cpu", repeats=2))
    (product,) = (kernel for kernel in found if kernel.name == "aten::mm")
    assert product.launches == 3
    assert 0 < product.seconds < 1
    assert [kernel.seconds for kernel in found] == sorted((kernel.seconds for kernel in found), reverse=True)
