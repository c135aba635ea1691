"""Hardness against exact fractions."""

from fractions import Fraction

import pytest

from rloop_mcore.algorithm.hard_problems import is_hard, samples_needed


@pytest.mark.parametrize("threshold", ["0.1", "0.3", "0.05", "0.07", "0.5", "1", "0.125", "0.001"])
def test_hard_as_with_exact_decimals(threshold):
    exact = Fraction(threshold)
    for samples in range(1, 250):
        for successes in range(samples + 1):
            assert is_hard(successes, samples, float(threshold)) == (Fraction(successes, samples) < exact)


@pytest.mark.parametrize(
    ("threshold", "needed"), [(0.1, 11), (0.3, 4), (0.5, 3), (1.0, 2), (0.05, 21), (0.07, 15), (0.001, 1001)]
)
def test_samples_needed_is_the_least(threshold, needed):
    assert samples_needed(threshold) == needed
    assert is_hard(1, needed, threshold)
    assert not any(is_hard(1, samples, threshold) for samples in range(1, needed))
