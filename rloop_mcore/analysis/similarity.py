"""How alike the solutions of two checkpoints are (arXiv 2511.04285, appendix A).

A solution is the set of its bigrams: pairs of neighbouring token ids. For one problem let B be the incidence matrix
[solutions, bigrams] of all checkpoints' solutions, then

    |a ∩ b| = (B B^T)[a, b],    J(a, b) = |a ∩ b| / (|a| + |b| - |a ∩ b|),

and S[i, j] is the mean of J over all N x N pairs (a of i, b of j), averaged over problems. A bigram that only one
solution has is in no intersection; of one that few have, the pairs are counted; those that many have are multiplied by
BLAS, in float32, which has these counts (below 2^24) exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rloop_mcore.analysis.answers import Answers

_FEW = 80  # where counting pairs and multiplying take about the same time, for some hundred solutions
_PAIRS = 2_000_000  # counted at once


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


def without_self_pairs(diagonal: float, samples: float) -> float:
    """The intra-step similarity over pairs of different solutions, of S[i, i] over `samples` solutions a problem."""
    return (samples * diagonal - 1) / (samples - 1) if samples > 1 else float("nan")


def pairwise_jaccard(responses: Sequence[np.ndarray]) -> np.ndarray:
    """J of the bigram sets of all pairs of responses (token ids each): [responses, responses]."""
    rows, bigrams = _incidence(responses)
    count = len(responses)
    sizes = np.bincount(rows, minlength=count)
    groups = list(_by_frequency(rows, bigrams))
    shared = _multiply([holders for holders in groups if holders.shape[1] > _FEW], count)
    for holders in groups:
        if holders.shape[1] <= _FEW:
            shared += _count_pairs(holders, count)
    np.fill_diagonal(shared, sizes)
    union = sizes[:, None] + sizes[None, :] - shared
    return np.divide(shared, union, out=np.ones(shared.shape), where=union > 0)


def _incidence(responses: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(response, bigram) of every bigram that a response has, once each; a bigram is first * 2^32 + second."""
    sets = [np.unique((ids[:-1].astype(np.int64) << 32) | ids[1:].astype(np.int64)) for ids in responses]
    rows = np.repeat(np.arange(len(sets)), [len(each) for each in sets])
    return rows, np.concatenate(sets) if sets else np.empty(0, np.int64)


def _by_frequency(rows: np.ndarray, bigrams: np.ndarray) -> Iterator[np.ndarray]:
    """For each number d > 1 of responses that some bigrams have: which they are, [bigrams, d], ascending."""
    order = np.lexsort((rows, bigrams))
    rows = rows[order]
    _, starts, counts = np.unique(bigrams[order], return_index=True, return_counts=True)
    for d in np.unique(counts[counts > 1]).tolist():
        yield rows[starts[counts == d][:, None] + np.arange(d)]


def _count_pairs(holders: np.ndarray, count: int) -> np.ndarray:
    """How many bigrams each two responses share [count, count]: pair by pair. The diagonal is left 0."""
    first, second = np.triu_indices(holders.shape[1], 1)
    upper = np.zeros(count * count)
    for part in np.array_split(holders, -(-len(holders) * len(first) // _PAIRS)):
        upper += np.bincount((part[:, first] * count + part[:, second]).ravel(), minlength=count * count)
    return upper.reshape(count, count) + upper.reshape(count, count).T


def _multiply(groups: Sequence[np.ndarray], count: int) -> np.ndarray:
    """The same by B B^T, the diagonal too; B is small, as only so many bigrams can be that frequent."""
    dense = np.zeros((count, sum(map(len, groups))), np.float32)
    column = 0
    for holders in groups:
        dense[holders, column + np.arange(len(holders))[:, None]] = 1
        column += len(holders)
    return (dense @ dense.T).astype(np.float64)


def _mean_by_block(pairs: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """The mean over the block of each two checkpoints; `lengths` solutions belong to each, in order."""
    starts = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    sums = np.add.reduceat(np.add.reduceat(pairs, starts, axis=0), starts, axis=1)
    return sums / np.outer(lengths, lengths)
