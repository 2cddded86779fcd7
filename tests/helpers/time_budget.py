"""`pytest --seconds N`: run what the time allows, from another file every day, and say what is left
out.
"""

from __future__ import annotations

import itertools
import math
import time
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

NO_TIME = "no time left of --seconds"
DAY = 86_400


def add_options(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, help="start no test after N seconds; the summary says how many ran")
    parser.addoption("--turn", type=int, help="with --seconds: the file to start with; by default the day decides")
    # Read by the processes of pytest-xdist, which must agree on the order and on the end.
    parser.addoption("--deadline", type=float, help="with --seconds: the end in seconds since 1970")


def first_file(files: int, turn: int) -> int:
    """Return the index of the file that turn number `turn` starts with.

    The step has no divisor in common with `files`, so `files` turns start with every file once. It
    is about 0.38 of `files`, so that a few turns in a row start far apart.
    """
    step = max(1, round(0.382 * files))
    while math.gcd(step, files) > 1:
        step += 1
    return turn * step % files


def rotate(items: Sequence[Any], turn: int) -> list[Any]:
    """Return the tests with whole files moved from the front to the back."""
    files = [list(group) for _, group in itertools.groupby(items, lambda item: item.nodeid.partition("::")[0])]
    first = first_file(len(files), turn) if files else 0
    return [item for group in files[first:] + files[:first] for item in group]


class TimeBudget:
    """The plugin that skips, counts and reports.

    It reads and completes the options of `add_options`.
    """

    def __init__(self, options: Any) -> None:
        options.turn = int(time.time() // DAY) if options.turn is None else options.turn
        options.deadline = time.time() + options.seconds if options.deadline is None else options.deadline
        self.options = options
        self.collected: list[str] = []
        self.ran = 0
        self.left: list[str] = []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = rotate(items, self.options.turn)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.collected = self.collected or [item.nodeid for item in session.items]

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self.collected = ids

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if time.time() > self.options.deadline:
            pytest.skip(NO_TIME)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "setup":
            return
        if report.skipped and NO_TIME in str(report.longrepr):
            self.left.append(report.nodeid)
        else:
            self.ran += 1

    def summary(self) -> list[str]:
        """Return lines such as `ran 412 of 1,377 (30 %), stopped at tests/x.py`."""
        total = len(self.collected)
        if not total:
            return ["ran 0 of 0"]
        end = f"stopped at {self.left[0].partition('::')[0]}" if self.left else "with time to spare"
        return [
            f"turn {self.options.turn} starts with {self.collected[0].partition('::')[0]}",
            f"ran {self.ran:,} of {total:,} ({self.ran / total:.0%}), {end}".replace("%", " %"),
        ]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section(f"--seconds {self.options.seconds:g}")
        for line in self.summary():
            terminalreporter.write_line(line)
