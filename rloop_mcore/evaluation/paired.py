"""Two checkpoints on the same problems: the difference, its interval, and how likely chance alone makes as much."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rloop_mcore.evaluation.bootstrap import Interval, bootstrap_interval

_EXACT_UP_TO = 16  # problems that differ: 2^16 assignments of signs
_DRAWS_AT_ONCE = 2_000_000
_TIE = 1e-12  # of the sum of all |d|: sums of the same numbers in another order, which may be 0 but for rounding


@dataclass(frozen=True, slots=True)
class Difference:
    """First minus second: the mean over problems with its 95 % interval, and the p-value of `compare_paired`."""

    interval: Interval
    p_value: float
    problems: int


def compare_paired(first: ArrayLike, second: ArrayLike, seed: int, resamples: int = 20_000) -> Difference:
    """Compare the scores [problems] of two checkpoints on the same problems, in the same order.

    The interval is the percentile bootstrap over problems of the mean of d = first - second. The p-value is that of
    the two-sided sign-flip permutation test: where both are alike, each d could as well have the other sign, so
    p = P(|mean(s d)| >= |mean(d)|) over signs s. Exactly, over all signs, where at most 16 problems differ; else
    (1 + exceedances) / (1 + resamples) over random ones (Phipson and Smyth 2010). Raises ValueError where the lengths
    differ or are 0.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"a paired comparison needs the same problems: {a.size} and {b.size} scores")
    differences = a - b
    return Difference(bootstrap_interval(differences, seed), _p_value(differences, seed, resamples), a.size)


def _p_value(differences: NDArray[np.float64], seed: int, resamples: int) -> float:
    moving = differences[differences != 0]
    observed = abs(moving.sum()) - _TIE * np.abs(moving).sum()
    if moving.size <= _EXACT_UP_TO:
        signs = np.array(list(product((-1.0, 1.0), repeat=moving.size)))
        return float((np.abs(signs @ moving) >= observed).mean())
    rng, block, exceedances = np.random.default_rng(seed), max(1, _DRAWS_AT_ONCE // moving.size), 0
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        signs = rng.integers(2, size=(rows, moving.size)) * 2.0 - 1.0
        exceedances += int((np.abs(signs @ moving) >= observed).sum())
    return (1 + exceedances) / (1 + resamples)
