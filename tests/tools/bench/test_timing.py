"""Rounds: every candidate once in each, in turn, and a failure ends one candidate alone."""

from __future__ import annotations

from mhc_compile.tools.bench.timing import interleave
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
