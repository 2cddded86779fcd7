"""Medians and quartiles, and ratios of what was measured in the same round."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Spread", "paired_difference", "paired_ratio", "spread"]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of some values."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value. Quartiles are those of the values themselves, interpolated between neighbours."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def paired_ratio(values: Sequence[float], base: Sequence[float]) -> Spread:
    """Of `value / base` round by round: what disturbed a whole round disturbs both and cancels."""
    return spread([value / one for value, one in zip(values, base, strict=True)])


def paired_difference(values: Sequence[float], base: Sequence[float]) -> Spread:
    """Of `value − base` round by round."""
    return spread([value - one for value, one in zip(values, base, strict=True)])
