"""How alike the solutions of two checkpoints are (arXiv 2511.04285, appendix A).

A solution is the set of its bigrams: pairs of neighbouring token ids. For one problem let B be the incidence matrix
[solutions, bigrams] of all checkpoints' solutions, then

    |a ∩ b| = (B B^T)[a, b],    J(a, b) = |a ∩ b| / (|a| + |b| - |a ∩ b|),

and S[i, j] is the mean of J over all N x N pairs (a of i, b of j), averaged over problems. The products are counts
below 2^24, so float32 has them exactly, and BLAS does them; a bigram that only one solution has is in no intersection.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rloop_mcore.analysis.answers import Answers

_COLUMNS = 4096  # bigrams multiplied at once: 10 MB for 640 solutions


def similarity_matrix(checkpoints: Sequence[Answers], problems: Sequence[str]) -> np.ndarray:
    """S [checkpoints, checkpoints], symmetric, each entry in [0, 1]; NaN without problems.

    On the diagonal the pairs of a solution with itself count, as the definition has it: they add (1 - s) / N to the
    mean s of the others (see `without_self_pairs`). Two solutions of less than two tokens have no bigram: J is 1.
    """
    total = np.zeros((len(checkpoints), len(checkpoints)))
    for problem in problems:
        responses = [[answers.response(row) for row in answers.rows_of(problem)] for answers in checkpoints]
        total += _mean_by_block(pairwise_jaccard([r for each in responses for r in each]), [len(r) for r in responses])
    return total / len(problems) if problems else np.full_like(total, np.nan)


def without_self_pairs(diagonal: float, samples: int) -> float:
    """The intra-step similarity over pairs of different solutions, of S[i, i] over `samples` solutions a problem."""
    return (samples * diagonal - 1) / (samples - 1) if samples > 1 else float("nan")


def pairwise_jaccard(responses: Sequence[np.ndarray]) -> np.ndarray:
    """J of the bigram sets of all pairs of responses (token ids each): [responses, responses]."""
    rows, bigrams = _incidence(responses)
    sizes = np.bincount(rows, minlength=len(responses)).astype(np.float32)
    shared = np.zeros((len(responses), len(responses)), np.float32)
    for part_rows, part_columns, width in _parts(rows, bigrams):
        dense = np.zeros((len(responses), width), np.float32)
        dense[part_rows, part_columns] = 1
        shared += dense @ dense.T
    np.fill_diagonal(shared, sizes)
    union = sizes[:, None] + sizes[None, :] - shared
    return np.divide(shared, union, out=np.ones(shared.shape), where=union > 0)


def _incidence(responses: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(response, bigram) of every bigram that a response has, once each; a bigram is first * 2^32 + second."""
    sets = [np.unique((ids[:-1].astype(np.int64) << 32) | ids[1:].astype(np.int64)) for ids in responses]
    rows = np.repeat(np.arange(len(sets)), [len(each) for each in sets])
    return rows, np.concatenate(sets) if sets else np.empty(0, np.int64)


def _parts(rows: np.ndarray, bigrams: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """The incidences of bigrams that more than one response has, `_COLUMNS` bigrams at a time: rows, columns, width."""
    _, column, counts = np.unique(bigrams, return_inverse=True, return_counts=True)
    number = np.cumsum(counts > 1) - 1  # of the shared ones
    shared = counts[column] > 1
    rows, column = rows[shared], number[column[shared]]
    order = np.argsort(column, kind="stable")
    rows, column = rows[order], column[order]
    width = int(number[-1]) + 1 if len(number) else 0
    parts = []
    for first in range(0, width, _COLUMNS):
        low, high = np.searchsorted(column, [first, first + _COLUMNS])
        parts.append((rows[low:high], column[low:high] - first, min(_COLUMNS, width - first)))
    return parts


def _mean_by_block(pairs: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """The mean over the block of each two checkpoints; `lengths` solutions belong to each, in order."""
    starts = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    sums = np.add.reduceat(np.add.reduceat(pairs, starts, axis=0), starts, axis=1)
    return sums / np.outer(lengths, lengths)
