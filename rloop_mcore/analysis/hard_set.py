"""The problems that stay hard through an exploration, and how that set changes from iteration to iteration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rloop_mcore.algorithm.hard_problems import is_hard
from rloop_mcore.analysis.samples import Samples


@dataclass(frozen=True, slots=True)
class HardSet:
    """Problems of one iteration's exploration, counted.

    `sampled` = `never` (no success) + `hard` (some, at a rate below the threshold) + `others`. Of the hard ones
    `stayed` were hard in the iteration before, `entered` were not; `left` were hard before and are not now.
    """

    iteration: int
    sampled: int
    never: int
    hard: int
    others: int
    entered: int
    stayed: int
    left: int

    @property
    def turnover(self) -> float:
        """1 - |hard now and before| / |hard now or before|, in [0, 1]; NaN where both are empty."""
        union = self.entered + self.stayed + self.left
        return 1 - self.stayed / union if union else float("nan")


def success_counts(samples: Samples, iteration: int) -> tuple[np.ndarray, np.ndarray]:
    """Successes and samples of each problem [problems] in the iteration's exploration, whatever the step."""
    mine = samples.iteration == iteration
    problem, count = samples.problem[mine], len(samples.problems)
    asked = np.bincount(problem, minlength=count)
    return np.bincount(problem, weights=samples.correct[mine], minlength=count).astype(np.int64), asked


def hard_problems(samples: Samples, iteration: int, threshold: float) -> np.ndarray:
    """Which problems are what RFT learns from: 0 < successes / samples < threshold over the phase; bool [problems].

    `threshold` is the paper's 10 %.
    """
    successes, asked = success_counts(samples, iteration)
    return (successes > 0) & is_hard(successes, np.maximum(asked, 1), threshold)


def hard_sets(samples: Samples, threshold: float) -> list[HardSet]:
    """One of each iteration, in order; the first iteration's hard problems have all `entered`."""
    sets, before = [], np.zeros(len(samples.problems), bool)
    for iteration in np.unique(samples.iteration).tolist():
        successes, asked = success_counts(samples, iteration)
        hard = hard_problems(samples, iteration, threshold)
        sampled, never = int((asked > 0).sum()), int(((asked > 0) & (successes == 0)).sum())
        sets.append(
            HardSet(
                iteration=iteration,
                sampled=sampled,
                never=never,
                hard=int(hard.sum()),
                others=sampled - never - int(hard.sum()),
                entered=int((hard & ~before).sum()),
                stayed=int((hard & before).sum()),
                left=int((before & ~hard).sum()),
            )
        )
        before = hard
    return sets
