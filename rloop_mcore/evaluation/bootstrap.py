"""The uncertainty of a benchmark's mean: a percentile bootstrap over its problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_DRAWS_AT_ONCE = 2_000_000  # bounds the memory of one block of resamples
_ENDS = ((1 - 0.95) / 2, (1 + 0.95) / 2)  # quantiles of an interval of 95 %


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean and the ends of its bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(scores: ArrayLike, seed: int, resamples: int = 10_000) -> Interval:
    """Mean of `scores` [problems] with its percentile bootstrap interval of 95 %.

    Problems are resampled with replacement `resamples` times; the interval spans the central 95 % of the
    resampled means (Efron 1979). It speaks of the choice of problems; the samples a problem are taken as they fell.
    Raises ValueError without scores.
    """
    return bootstrap_mean_interval([scores], seed, resamples)


def bootstrap_mean_interval(benchmarks: Sequence[ArrayLike], seed: int, resamples: int = 10_000) -> Interval:
    """The unweighted mean over benchmarks of each one's mean score, with its interval; scores are [problems].

    Every benchmark's problems are resampled among themselves. Raises ValueError for one without scores.
    """
    rng, scores = np.random.default_rng(seed), [np.asarray(each, dtype=np.float64) for each in benchmarks]
    if not scores or any(values.ndim != 1 or values.size == 0 for values in scores):
        raise ValueError("a bootstrap needs a non-empty list of scores, one a problem")
    means = np.mean([_resampled_means(values, rng, resamples) for values in scores], axis=0)
    low, high = np.quantile(means, _ENDS)
    return Interval(float(np.mean([values.mean() for values in scores])), float(low), float(high))


def _resampled_means(values: NDArray[np.float64], rng: np.random.Generator, resamples: int) -> NDArray[np.float64]:
    block = max(1, _DRAWS_AT_ONCE // values.size)
    means = []
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        means.append(values[rng.integers(values.size, size=(rows, values.size))].mean(axis=1))
    return np.concatenate(means)
