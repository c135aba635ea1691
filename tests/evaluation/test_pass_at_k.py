"""pass@k against an enumeration of all draws and against exact integer binomials."""

from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest

from rloop_mcore.evaluation.pass_at_k import average, pass_at_k


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_equals_the_enumeration_of_all_draws(n: int) -> None:
    for k in range(1, n + 1):
        expected = []
        for c in range(n + 1):
            outcomes = [1] * c + [0] * (n - c)
            expected.append(np.mean([any(draw) for draw in combinations(outcomes, k)]))
        with np.errstate(divide="raise"):  # a certain success is no warning
            np.testing.assert_allclose(pass_at_k(range(n + 1), n, k), expected, rtol=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(100_000, 1, 32), (100_000, 3, 50_000), (100_000, 99_990, 8), (64, 64, 64)])
def test_is_stable_for_many_samples(n: int, c: int, k: int) -> None:
    exact = float(1 - Fraction(comb(n - c, k), comb(n, k)))
    assert pass_at_k([c], n, k)[0] == pytest.approx(exact, rel=1e-12)


def test_problems_may_differ_in_samples() -> None:
    together = pass_at_k([1, 3, 0], [4, 32, 7], 4)
    alone = [pass_at_k([c], [n], 4)[0] for c, n in [(1, 4), (3, 32), (0, 7)]]
    np.testing.assert_array_equal(together, alone)


def test_pass_at_1_is_the_average() -> None:
    successes, samples = [0, 1, 17, 32], 32
    np.testing.assert_allclose(pass_at_k(successes, samples, 1), average(successes, samples), rtol=1e-12)
    np.testing.assert_array_equal(average(successes, samples), np.array(successes) / 32)


@pytest.mark.parametrize(("c", "n", "k"), [([1], 4, 5), ([1], 4, 0), ([5], 4, 1), ([-1], 4, 1), ([0], 0, 1)])
def test_impossible_counts_are_refused(c: list[int], n: int, k: int) -> None:
    with pytest.raises(ValueError, match=r"samples|at least"):
        pass_at_k(c, n, k)


def test_no_samples_have_no_average() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        average([0], [0])


def test_equals_the_estimator_as_published() -> None:
    """Chen et al. 2021, figure 3: 1 - prod(1 - k / arange(n - c + 1, n + 1)), at the paper's n of 200."""
    n, successes = 200, np.arange(201)
    for k in (1, 10, 100):
        published = [1.0 if n - c < k else 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)) for c in successes]
        np.testing.assert_allclose(pass_at_k(successes, n, k), published, rtol=1e-9, atol=1e-12)
