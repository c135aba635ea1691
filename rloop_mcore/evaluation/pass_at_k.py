"""Avg@n and the unbiased pass@k estimator."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def average(successes: ArrayLike, samples: ArrayLike) -> NDArray[np.float64]:
    """Avg@n of each problem: the share of its n samples that are correct; float [problems].

    `successes` [problems] and `samples` [problems] are counts. Raises ValueError for impossible counts.
    """
    c, n = _counts(successes, samples)
    return c / n


def pass_at_k(successes: ArrayLike, samples: ArrayLike, k: int) -> NDArray[np.float64]:
    """Unbiased pass@k of each problem, 1 - C(n-c, k) / C(n, k); float [problems] (Chen et al. 2021, eq. 1).

    The chance that k of a problem's n samples, drawn without replacement, hold at least one of its c successes.
    `successes` c [problems] and `samples` n [problems] are counts. The ratio of the binomials is the product over
    j < k of 1 - c / (n-j), summed in logarithms, so that neither huge n nor a tiny c/n loses digits.
    Raises ValueError for impossible counts and where a problem has fewer than k samples.
    """
    c, n = _counts(successes, samples)
    if k < 1:
        raise ValueError(f"pass@k needs k of at least 1, not {k}")
    if k > n.min():
        raise ValueError(f"pass@{k} needs {k} samples a problem, but one has {n.min():.0f}")
    log_failure = np.zeros_like(c)
    with np.errstate(divide="ignore"):  # once every draw must hold a success: log 0, a pass@k of exactly 1
        for j in range(k):
            log_failure += np.log1p(-np.minimum(1.0, c / (n - j)))
    return -np.expm1(log_failure)


def _counts(successes: ArrayLike, samples: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    c = np.atleast_1d(np.asarray(successes, dtype=np.float64))
    n = np.broadcast_to(np.asarray(samples, dtype=np.float64), c.shape)
    if (n < 1).any() or (c < 0).any() or (c > n).any():
        raise ValueError("successes must lie between 0 and samples, and samples be at least 1")
    return c, n
