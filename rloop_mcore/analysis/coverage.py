"""Which problems a run has ever solved, which it solves now, and in how many ways."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rloop_mcore.analysis.answers import Answers


@dataclass(frozen=True, slots=True)
class Coverage:
    """Shares of the problems, one a checkpoint [checkpoints]: `ever` = `now` + `lost`."""

    ever: np.ndarray
    now: np.ndarray
    lost: np.ndarray


def coverage(solved: np.ndarray) -> Coverage:
    """ever[t] = |union of solved(s), s <= t|, now[t] = |solved(t)|, lost[t] = ever[t] - now[t], over |problems|.

    `solved` is bool [checkpoints, problems], in the order of training.
    """
    if not solved.size:
        nothing = np.full(len(solved), np.nan)
        return Coverage(nothing, nothing, nothing)
    ever = np.logical_or.accumulate(solved, axis=0).mean(axis=1)
    now = solved.mean(axis=1)
    return Coverage(ever, now, ever - now)


def distinct_solutions(answers: Answers) -> float:
    """Mean over the problems of |{different correct responses}|, as token sequences; one that is not solved has 0."""
    counts = []
    for problem in answers.problems:
        rows = answers.rows_of(problem)
        counts.append(len({answers.response(row).tobytes() for row in rows[answers.correct[rows]]}))
    return float(np.mean(counts)) if counts else float("nan")
