"""The option `--seconds`, by which continuous integration runs a part of the slow tests every
day.
"""

from __future__ import annotations

import itertools
from argparse import Namespace

import pytest
from helpers.time_budget import TimeBudget, first_file, rotate


@pytest.mark.parametrize("files", [1, 2, 3, 6, 34, 61, 64])
def test_as_many_turns_as_files_start_with_every_file_once(files):
    for turn in (0, 20_420):
        assert sorted(first_file(files, turn + day) for day in range(files)) == list(range(files))


def test_a_few_turns_in_a_row_start_far_apart():
    starts = sorted(first_file(60, day) for day in range(5))
    assert all(after - before >= 6 for before, after in itertools.pairwise(starts))


def test_files_stay_whole():
    items = [Namespace(nodeid=f"{name}.py::test_{i}") for name in "abc" for i in range(2)]
    orders = {"".join(item.nodeid[0] for item in rotate(items, turn)) for turn in range(3)}
    assert orders == {"aabbcc", "bbccaa", "ccaabb"}
    assert rotate([], 1) == []


def run(folder, seconds: float, **options) -> TimeBudget:
    """Run two files of two tests each in this process; the second of them fails when it runs."""
    for name, body in (("a", "pass"), ("b", "assert False")):
        (folder / f"test_{name}.py").write_text(f"def test_one():\n    {body}\ndef test_two():\n    pass\n")
    budget = TimeBudget(Namespace(seconds=seconds, **{"turn": 0, "deadline": None, **options}))
    without = ("terminal", "cacheprovider", "xdist", "faulthandler", "logging", "hypothesispytest")
    flags = ["-o", "addopts=", "--import-mode=importlib", *(word for name in without for word in ("-p", f"no:{name}"))]
    budget.status = pytest.main([*flags, "--rootdir", str(folder), str(folder)], plugins=[budget])
    return budget


def test_without_time_nothing_runs_and_the_summary_says_so(tmp_path):
    budget = run(tmp_path, -1.0)
    assert (budget.ran, len(budget.left), budget.status) == (0, 4, 0)
    assert budget.summary() == ["turn 0 starts with test_a.py", "ran 0 of 4 (0 %), stopped at test_a.py"]


def test_failures_fail_and_the_turn_decides_what_is_first(tmp_path):
    budget = run(tmp_path, 600.0, turn=1)
    assert (budget.ran, budget.left, budget.status) == (4, [], pytest.ExitCode.TESTS_FAILED)
    assert budget.summary() == ["turn 1 starts with test_b.py", "ran 4 of 4 (100 %), with time to spare"]


def test_the_day_decides_if_no_turn_is_given():
    budget = TimeBudget(Namespace(seconds=1.0, turn=None, deadline=None))
    assert budget.options.turn > 20_000
    assert budget.options.deadline > budget.options.turn * 86_400
