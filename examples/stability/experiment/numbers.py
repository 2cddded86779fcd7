"""The statistics of the report, each by its definition."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

#: A spike is a gradient norm above so many medians of the `WINDOW` steps before it.
SPIKE, WINDOW = 3.0, 50
#: A surge is a trailing mean over `TAIL` losses that is so many nats above the lowest one before
#: it.
SURGE, TAIL = 0.5, 20
#: 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % confidence interval, infinite for a single observation."""

    value: float
    low: float
    high: float


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean of up to 31 values ± t(0.975, N − 1) · s / sqrt(N)."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Interval(mean, -math.inf, math.inf)
    half = _T[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def median_interval(values: Sequence[float]) -> Interval:
    """Return the median and the narrowest order statistics that hold it with 95 % confidence.

    The k-th smallest and the k-th largest of N values miss the median with probability 2 ·
    P(Binomial(N, 1/2) < k).
    """
    ordered, count = sorted(values), len(values)
    k, below = 0, 0.0
    while (below := below + math.comb(count, k) / 2**count) <= 0.025:
        k += 1
    if k == 0:
        return Interval(statistics.median(ordered), -math.inf, math.inf)
    return Interval(statistics.median(ordered), ordered[k - 1], ordered[-k])


def proportion_interval(hits: int, count: int) -> Interval:
    """Return Clopper and Pearson's interval for `hits` of `count`: no tail is below 2.5 %."""

    def at_most(k: int, p: float) -> float:
        return sum(math.comb(count, i) * p**i * (1 - p) ** (count - i) for i in range(k + 1))

    def root(k: int, level: float) -> float:  # of a function that falls with p
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if at_most(k, middle) > level else (low, middle)
        return low

    low = 0.0 if hits == 0 else root(hits - 1, 0.975)
    high = 1.0 if hits == count else root(hits, 0.025)
    return Interval(hits / count, low, high)


def trailing(losses: Sequence[float]) -> list[float]:
    """Return means over the last `TAIL` losses, from the first step that has so many."""
    return [statistics.fmean(losses[i - TAIL : i]) for i in range(TAIL, len(losses) + 1)]


def spikes(norms: Sequence[float]) -> list[int]:
    """Return steps with a norm above `SPIKE` medians of the `WINDOW` before, or not finite."""
    return [
        step
        for step in range(WINDOW, len(norms))
        if not norms[step] <= SPIKE * statistics.median(norms[step - WINDOW : step])
    ]


def surges(losses: Sequence[float]) -> int:
    """Count how often the trailing mean rises to `SURGE` above its lowest value so far."""
    lowest, above, count = math.inf, False, 0
    for mean in trailing(losses):
        lowest = min(lowest, mean)
        now = mean > lowest + SURGE
        count += now and not above
        above = now
    return count


def diverged(losses: Sequence[float], norms: Sequence[float]) -> bool:
    """Return whether a loss or gradient norm is not finite, or the run ends in a surge."""
    if not all(map(math.isfinite, (*losses, *norms))):
        return True
    means = trailing(losses)
    return bool(means) and means[-1] > min(means) + SURGE
