"""The advantage of a response over the other responses of its group."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev


def group_advantages(rewards: Sequence[float], kind: str) -> list[float]:
    """Rewards of one group [group], G of them -> advantages [group].

    - `group_std`: (r - mean) / std, GRPO's and DAPO's (arXiv 2503.14476, eq. 9). The paper does not say which standard
      deviation; the code it was released with (verl) takes the sample standard deviation (divisor G - 1), and so do we.
      It also adds 1e-6 to it, which only matters where all rewards are equal.
    - `group_mean`: r - mean, Dr. GRPO's (arXiv 2503.20783): dividing by the deviation gives problems that are almost
      always or almost never solved a greater weight.
    - `leave_one_out`: r - mean of the other G - 1, RLOO's (arXiv 2402.14740): an unbiased baseline. It is `group_mean`
      times G / (G - 1).

    Where all rewards are equal, so in a group of one, every advantage is 0.
    Raises ValueError for another kind.
    """
    if min(rewards) == max(rewards):
        return [0.0] * len(rewards)
    mean = fmean(rewards)
    match kind:
        case "group_std":
            deviation = stdev(rewards)
            return [(reward - mean) / deviation for reward in rewards]
        case "group_mean":
            return [reward - mean for reward in rewards]
        case "leave_one_out":
            scale = len(rewards) / (len(rewards) - 1)
            return [(reward - mean) * scale for reward in rewards]
        case _:
            raise ValueError(f"unknown advantage {kind!r}")
