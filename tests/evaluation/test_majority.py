"""maj@k against a vote in every possible draw, and against exact fractions."""

from collections import Counter
from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest

from rloop_mcore.evaluation.majority import majority_at_k

Choices = list[tuple[int, float]]


def vote_in_every_draw(choices: Choices, samples: int, k: int) -> float:
    ballots = [answer for answer, (count, _) in enumerate(choices) for _ in range(count)]
    ballots += [-1] * (samples - len(ballots))
    won = []
    for draw in combinations(ballots, k):
        votes = Counter(answer for answer in draw if answer >= 0)
        winners = [answer for answer, count in votes.items() if count == max(votes.values())]
        won.append(sum(choices[answer][1] for answer in winners) / len(winners) if winners else 0.0)
    return float(np.mean(won))


@pytest.mark.parametrize(
    ("choices", "samples"),
    [
        ([(3, 1.0), (2, 0.0), (1, 0.0)], 7),
        ([(3, 0.0), (3, 1.0), (2, 1.0), (1, 0.0)], 10),  # several right answers; a tie of two
        ([(1, 1.0), (1, 0.0), (1, 0.0), (1, 0.0)], 4),  # all tie
        ([(2, 1.0)], 8),  # most samples have no answer
        ([(4, 0.5), (4, 0.0), (1, 1.0)], 11),
        ([(2, 0.0), (3, 0.0)], 6),
        ([], 3),
    ],
)
def test_equals_a_vote_in_every_draw(choices: Choices, samples: int) -> None:
    for k in range(1, samples + 1):
        assert majority_at_k(choices, samples, k) == pytest.approx(vote_in_every_draw(choices, samples, k), abs=1e-12)


def test_a_vote_of_one_is_the_average() -> None:
    assert majority_at_k([(5, 1.0), (9, 0.0)], 20, 1) == pytest.approx(5 / 20, rel=1e-12)


def test_a_vote_of_all_is_the_count() -> None:
    assert majority_at_k([(12, 1.0), (11, 0.0), (5, 0.0)], 32, 32) == pytest.approx(1.0, abs=1e-12)
    assert majority_at_k([(11, 1.0), (12, 0.0), (5, 0.0)], 32, 32) == 0.0
    assert majority_at_k([(8, 1.0), (8, 0.0), (8, 0.0), (8, 0.0)], 32, 32) == pytest.approx(0.25, rel=1e-12)


def test_is_stable_for_many_samples() -> None:
    n, right, k = 100_000, 40_000, 5
    wrong = n - right
    exact = sum(Fraction(comb(right, j) * comb(wrong, k - j), comb(n, k)) for j in (3, 4, 5))
    assert majority_at_k([(right, 1.0), (wrong, 0.0)], n, k) == pytest.approx(float(exact), rel=1e-8)
    assert majority_at_k([(right, 1.0), (wrong, 0.0)], n, 257) == pytest.approx(5.5e-4, rel=0.2)  # the normal tail


@pytest.mark.parametrize(("choices", "samples", "k"), [([(3, 1.0)], 2, 1), ([(1, 1.0)], 4, 5), ([(1, 1.0)], 4, 0)])
def test_impossible_counts_are_refused(choices: Choices, samples: int, k: int) -> None:
    with pytest.raises(ValueError, match="samples"):
        majority_at_k(choices, samples, k)
