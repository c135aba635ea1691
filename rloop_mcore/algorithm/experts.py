"""Which of the expert trajectories RFT takes, where it is not to take all of them. The paper takes all."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

from rloop_mcore.algorithm.seeds import derive_seed
from rloop_mcore.types import ExpertQuery, Key


def drawn(keys: Sequence[Key], query: ExpertQuery) -> list[int]:
    """Positions, ascending, of the experts that `max_per_problem` and then `share` leave of those with these keys.

    Draws are by the seed and a trajectory's own key: they stay when others come or go.
    """
    kept = list(range(len(keys)))
    if query.max_per_problem:
        taken: Counter[str] = Counter()
        chosen = []
        for position in _shuffled(kept, keys, query.seed, "experts of a problem"):
            problem = keys[position][2]
            taken[problem] += 1
            if taken[problem] <= query.max_per_problem:
                chosen.append(position)
        kept = chosen
    if query.share < 1:
        count = math.ceil(Fraction(str(query.share)) * len(kept))  # 0.07 * 100 is more than 7 in doubles
        kept = _shuffled(kept, keys, query.seed, "share of the experts")[:count]
    return sorted(kept)


def _shuffled(positions: Sequence[int], keys: Sequence[Key], seed: int, purpose: str) -> list[int]:
    return sorted(positions, key=lambda position: derive_seed(seed, purpose, *keys[position]))
