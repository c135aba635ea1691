"""The group-normalised advantage of GRPO, as DAPO uses it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev


def group_advantages(rewards: Sequence[float]) -> list[float]:
    """(r - mean) / std over the rewards of one group [group] -> [group] (DAPO, arXiv 2503.14476, eq. 9).

    The paper does not say which standard deviation; the code it was released with (verl) takes the sample standard
    deviation (divisor group - 1), and so do we. It also adds 1e-6 to it, which only matters where all rewards are
    equal; there every advantage is 0 here, and in a group of one.
    """
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean, deviation = fmean(rewards), stdev(rewards)
    return [(reward - mean) / deviation for reward in rewards]
