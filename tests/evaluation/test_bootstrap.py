"""The bootstrap against the exact distribution over all resamples."""

from itertools import product

import numpy as np
import pytest

from rloop_mcore.evaluation import bootstrap
from rloop_mcore.evaluation.bootstrap import bootstrap_interval, bootstrap_mean_interval


def test_equals_the_enumeration_of_all_resamples() -> None:
    scores = np.array([0.0, 0.1, 0.35, 0.4, 0.8, 1.0])
    all_means = np.array([np.mean(draw) for draw in product(scores, repeat=len(scores))])
    interval = bootstrap_interval(scores, seed=3, resamples=200_000)
    assert interval.mean == pytest.approx(scores.mean())
    assert interval.low == pytest.approx(np.quantile(all_means, 0.025), abs=0.01)
    assert interval.high == pytest.approx(np.quantile(all_means, 0.975), abs=0.01)


def test_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        interval = bootstrap_interval(rng.binomial(32, 0.3, size=100) / 32, seed=trial, resamples=1_000)
        hits += interval.low <= 0.3 <= interval.high
    assert 0.90 <= hits / 300 <= 0.98


def test_the_seed_fixes_it() -> None:
    scores = np.linspace(0, 1, 50) ** 2
    assert bootstrap_interval(scores, seed=1) == bootstrap_interval(scores, seed=1)
    assert bootstrap_interval(scores, seed=1) != bootstrap_interval(scores, seed=2)


@pytest.mark.parametrize("draws", [1, 7, 12])
def test_blocks_change_nothing(draws: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = [0.0, 0.1, 1.0]
    at_once = bootstrap_interval(scores, seed=1, resamples=10)
    monkeypatch.setattr(bootstrap, "_DRAWS_AT_ONCE", draws)
    assert bootstrap_interval(scores, seed=1, resamples=10) == at_once


def test_equal_scores_have_no_width() -> None:
    interval = bootstrap_interval([1.0] * 30, seed=0)
    assert (interval.mean, interval.low, interval.high) == (1.0, 1.0, 1.0)


def test_no_scores_are_refused() -> None:
    for benchmarks in ([], [[]], [[1.0], []]):
        with pytest.raises(ValueError, match="non-empty"):
            bootstrap_mean_interval(benchmarks, seed=0)


def test_a_mean_over_benchmarks_resamples_each_among_itself() -> None:
    first, second = np.array([0.0, 0.1, 0.35, 0.4, 1.0]), np.array([0.5, 0.6, 0.75, 0.9])
    means_of_first, means_of_second = (np.array(list(product(s, repeat=len(s)))).mean(1) for s in (first, second))
    all_means = (means_of_first[:, None] + means_of_second) / 2
    interval = bootstrap_mean_interval([first, second], seed=1, resamples=200_000)
    assert interval.mean == pytest.approx((first.mean() + second.mean()) / 2)
    assert interval.low == pytest.approx(np.quantile(all_means, 0.025), abs=0.01)
    assert interval.high == pytest.approx(np.quantile(all_means, 0.975), abs=0.01)
