"""Interleaved rounds: every workload once, in turn, so that whatever the machine does meanwhile happens to all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from mhc_compile.tools.bench.workload import Times, Workload

__all__ = ["Rounds", "interleave"]


class Rounds:
    """What complete rounds measured.

    Attributes:
        times: by contender, one entry for each complete round.
        failures: by contender, what it raised; its times are dropped.
        complete: how many rounds.
        interrupted: Ctrl-C ended them early.
    """

    def __init__(self) -> None:
        self.times: dict[str, list[Times]] = {}
        self.failures: dict[str, BaseException] = {}
        self.complete = 0
        self.interrupted = False


def interleave(workloads: Mapping[str, Workload], rounds: int, warm_up: int, advance: Callable[[str], None]) -> Rounds:
    """`warm_up` rounds that do not count, then `rounds`. The order turns by one each time: nobody always follows the same.

    A workload that raises leaves the rounds. Ctrl-C ends them; complete rounds are kept.
    """
    result = Rounds()
    result.times = {name: [] for name in workloads}
    try:
        for index in range(-warm_up, rounds):
            names = [name for name in workloads if name not in result.failures]
            turn = index % max(1, len(names))
            measured: dict[str, Times] = {}
            for name in names[turn:] + names[:turn]:
                advance(name)
                try:
                    measured[name] = workloads[name].timed()
                except Exception as error:  # whatever a contender raises is its row, and the others go on
                    result.failures[name] = error
                    del result.times[name]
            if index >= 0:
                for name, times in measured.items():
                    result.times[name].append(times)
                result.complete = index + 1
    except KeyboardInterrupt:
        result.interrupted = True
    return result
