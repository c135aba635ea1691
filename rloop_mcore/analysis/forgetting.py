"""What a run learns and forgets between two checkpoints: the learning and forgetting matrices of arXiv 2511.04285."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rloop_mcore.analysis.answers import Answers


def solved_matrix(checkpoints: Sequence[Answers]) -> tuple[list[str], np.ndarray]:
    """Which problems each checkpoint solves: at least one of its samples is correct.

    Returns the problems that every checkpoint was asked, sorted, and bool [checkpoints, problems].
    """
    asked = [set(answers.problems) for answers in checkpoints]
    problems = sorted(set.intersection(*asked)) if asked else []
    solved = np.zeros((len(checkpoints), len(problems)), bool)
    for row, answers in enumerate(checkpoints):
        right = {answers.problems[index] for index in np.unique(answers.problem[answers.correct])}
        solved[row] = [problem in right for problem in problems]
    return problems, solved


def learning_matrix(solved: np.ndarray) -> np.ndarray:
    """L[i, j] = |{p: solved at j, not at i}| / |problems| for i < j, NaN elsewhere.

    `solved` is bool [checkpoints, problems], in the order of training; returns [checkpoints, checkpoints].
    """
    return _upper(_share(~solved, solved))


def forgetting_matrix(solved: np.ndarray) -> np.ndarray:
    """F[i, j] = |{p: solved at i, not at j}| / |problems| for i < j, NaN elsewhere; shapes as for L."""
    return _upper(_share(solved, ~solved))


def differential_matrix(vanilla: np.ndarray, rloop: np.ndarray) -> np.ndarray:
    """D[i, j] = F_vanilla[i, j] - F_RLoop[i, j]: positive where vanilla RL forgets more.

    Both [checkpoints, checkpoints] over the same RL steps and problems: RLoop's iteration i lies over vanilla's window
    of the same steps, N_RL i to N_RL (i + 1).
    """
    if vanilla.shape != rloop.shape:
        raise ValueError(f"matrices over {len(vanilla)} and {len(rloop)} checkpoints cannot be subtracted")
    return vanilla - rloop


def block_averages(matrix: np.ndarray, iterations: Sequence[int]) -> tuple[float, float]:
    """(intra, inter): the means of matrix[i, j] over pairs of one iteration and of two; NaN without any.

    NaN does not count: L, F and D are NaN but for i < j. `iterations` [checkpoints] says which iteration each
    checkpoint belongs to.
    """
    belongs = np.asarray(iterations)
    same = belongs[:, None] == belongs[None, :]
    known = ~np.isnan(matrix)
    intra, inter = (matrix[known & pairs] for pairs in (same, ~same))
    return (float(intra.mean()) if len(intra) else np.nan, float(inter.mean()) if len(inter) else np.nan)


def _share(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The share of problems that hold in `first` at i and in `second` at j."""
    return first.astype(float) @ second.T.astype(float) / max(first.shape[1], 1)


def _upper(matrix: np.ndarray) -> np.ndarray:
    return np.where(np.triu(np.ones(matrix.shape, bool), 1), matrix, np.nan)
