"""The paired comparison against all assignments of signs, against Fisher's own count, and under the null."""

from itertools import product

import numpy as np
import pytest

from rloop_mcore.evaluation import paired
from rloop_mcore.evaluation.paired import compare_paired


def test_equals_all_assignments_of_signs() -> None:
    first, second = np.array([0.5, 0.25, 1.0, 0.0, 0.75, 0.5, 0.9]), np.array([0.25, 0.5, 0.5, 0.0, 0.5, 0.125, 0.1])
    d = first - second
    sums = [abs(sum(s * each for s, each in zip(signs, d, strict=True))) for signs in product((1, -1), repeat=len(d))]
    expected = np.mean([total >= abs(d.sum()) - 1e-9 for total in sums])
    found = compare_paired(first, second, seed=0)
    assert found.p_value == pytest.approx(expected)
    assert found.problems == 7
    assert found.interval.mean == pytest.approx(d.mean())
    assert found.interval.low <= d.mean() <= found.interval.high


def test_darwins_maize_as_fisher_counted_it() -> None:
    """The Design of Experiments (1935), section 21: 863 of 32,768 assignments reach the observed sum of 314."""
    d = np.array([49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48])
    assert compare_paired(d, np.zeros(15), seed=0).p_value == pytest.approx(2 * 863 / 32768)


def test_random_signs_agree_with_all_of_them() -> None:
    d = np.array([49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48, 1e-6, -1e-6])  # 17: too many to enumerate
    assert compare_paired(d, np.zeros(17), seed=0).p_value == pytest.approx(2 * 863 / 32768, abs=0.006)


@pytest.mark.parametrize("at_once", [2_000_000, 10_000, 10])
def test_random_signs_are_counted_to_the_last(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many are drawn at once: all reach a sum of 0; a sum of 50 ones is reached once in 2^49 draws, so never,
    and p is what Phipson and Smyth give then."""
    monkeypatch.setattr(paired, "_DRAWS_AT_ONCE", at_once)
    assert compare_paired(np.tile([1.0, -1.0], 25), np.zeros(50), seed=0, resamples=5_000).p_value == 1.0
    assert compare_paired(np.ones(50), np.zeros(50), seed=0, resamples=5_000).p_value == 1 / 5_001


def test_the_p_value_is_uniform_where_both_are_alike() -> None:
    rng = np.random.default_rng(0)
    p = [
        compare_paired(rng.binomial(8, 0.4, 30) / 8, rng.binomial(8, 0.4, 30) / 8, seed, 500).p_value
        for seed in range(300)
    ]
    assert np.mean(np.array(p) <= 0.05) <= 0.09
    assert 0.40 <= np.mean(np.array(p) <= 0.5) <= 0.60


def test_sums_that_are_equal_but_for_rounding_count_as_equal() -> None:
    """In tenths these differences add up to 0, which every assignment reaches; in floats they add up to 5.6e-17."""
    first, second = np.array([0, 7, 4, 3, 10, 6, 9]) / 10, np.array([4, 8, 10, 7, 6, 0, 4]) / 10
    assert (first - second).sum() != 0
    assert compare_paired(first, second, seed=0).p_value == 1.0


def test_the_same_scores_differ_by_nothing() -> None:
    found = compare_paired([0.5, 0.25], [0.5, 0.25], seed=0)
    assert (found.p_value, found.interval.mean, found.interval.low, found.interval.high) == (1.0, 0.0, 0.0, 0.0)


def test_other_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="same problems"):
        compare_paired([0.5], [0.5, 0.5], seed=0)
