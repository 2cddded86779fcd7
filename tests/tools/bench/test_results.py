"""Medians, quartiles and paired ratios."""

from __future__ import annotations

import pytest

from mhc_compile.tools.bench.results import Spread, paired_difference, paired_ratio, spread


def test_quartiles_are_those_of_the_values():
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(median=3.0, low=2.0, high=4.0)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0)
    assert spread([1.0, 2.0]).median == 1.5


def test_a_ratio_is_taken_within_a_round():
    plain = [1.0, 10.0, 1.0]  # the second round was disturbed, and so was the other
    other = [2.0, 20.0, 2.0]
    assert paired_ratio(other, plain) == Spread(2.0, 2.0, 2.0)
    assert paired_difference(other, plain).median == 1.0


def test_the_median_of_ratios_is_not_the_ratio_of_medians():
    assert paired_ratio([1.0, 4.0, 9.0], [1.0, 2.0, 9.0]).median == 1.0


def test_rounds_must_match():
    with pytest.raises(ValueError, match="longer"):
        paired_ratio([1.0], [1.0, 2.0])
