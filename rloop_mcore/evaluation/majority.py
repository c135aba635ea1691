"""maj@k: the chance that a vote among k samples of a problem is won by a right answer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def majority_at_k(choices: Sequence[tuple[int, float]], samples: int, k: int) -> float:
    """Unbiased maj@k of one problem, exactly: the mean over all draws of k of its samples without replacement.

    `choices` are the answers that were given: (how many of the `samples` gave it, the share of those that are right).
    The most frequent answer in the draw wins; of t that tie each wins with chance 1/t. Samples without an answer are
    drawn and don't vote; where nobody votes the vote is lost.

    For each right answer a with m_a samples, sum over j of P(j of a in the draw) E[1 / (1 + ties) | the others have at
    most j]. The others are drawn one after the other: with r draws and N samples left, i fall to an answer with m of
    the N with chance C(m,i) C(N-m,r-i) / C(N,r). The state is [j, ties, r], and no term is negative, so nothing
    cancels. Raises ValueError for impossible counts.
    """
    voters = sum(count for count, _ in choices)
    if not 1 <= k <= samples or voters > samples or any(count < 1 for count, _ in choices):
        raise ValueError(f"maj@{k} needs 1 <= k <= {samples} samples, of which {voters} gave an answer")
    total = 0.0
    for place, (count, right) in enumerate(choices):
        if right:
            others = [other for number, (other, _) in enumerate(choices) if number != place]
            total += right * _wins(count, others, samples, k)
    return min(total, 1.0)


def _wins(count: int, others: Sequence[int], samples: int, k: int) -> float:
    """The chance that an answer with `count` of the samples wins against `others` [answers]."""
    most, ties = min(count, k), min(len(others), k - 1)
    state = np.zeros((most + 1, ties + 2, k + 1))
    for j in range(most + 1):
        state[j, 0, k - j] = _hypergeometric(np.array([k]), j, count, samples)[0]
    state[0] = 0.0  # who has no vote does not win
    left, draws = samples - count, np.arange(k + 1)
    for other in others:
        after = np.zeros_like(state)
        for i in range(min(other, most) + 1):
            moved = np.zeros_like(state)
            moved[:, :, : k + 1 - i] = (state * _hypergeometric(draws, i, other, left))[:, :, i:]
            after[i + 1 :] += moved[i + 1 :]
            after[i, 1:] += moved[i, :-1]  # a tie; state[0] is empty, so i is at least 1 where this counts
        state, left = after, left - other
    shares = 1.0 / (1.0 + np.arange(ties + 2))
    return float(np.einsum("jtr,t->", state, shares))


def _hypergeometric(draws: NDArray[np.int64], hits: int, marked: int, size: int) -> NDArray[np.float64]:
    """P(`hits` marked ones among each number of draws, without replacement) from `size` with `marked`; [draws]."""
    possible = (hits <= draws) & (draws - hits <= size - marked) & (draws <= size)
    chances = np.zeros(len(draws))
    if hits <= marked:
        d = draws[possible]
        log = _log_choose(marked, np.full_like(d, hits)) + _log_choose(size - marked, d - hits) - _log_choose(size, d)
        chances[possible] = np.exp(log)
    return chances


def _log_choose(n: int, k: NDArray[np.int64]) -> NDArray[np.float64]:
    table = _log_factorials(1 << max(n, 1).bit_length())
    return table[n] - table[k] - table[n - k]


@lru_cache(maxsize=8)
def _log_factorials(size: int) -> NDArray[np.float64]:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, size, dtype=np.float64)))])
