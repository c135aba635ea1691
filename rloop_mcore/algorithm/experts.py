"""Which of the expert trajectories RFT takes, where it is not to take all of them. The paper takes all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from rloop_mcore.algorithm.seeds import derive_seed
from rloop_mcore.types import Trajectory


class Narrowing(Protocol):
    """These keys of `rft`."""

    steps: list[int]
    min_tokens: int
    max_per_problem: int
    share: float


def narrowed(experts: Sequence[Trajectory], rft: Narrowing, seed: int) -> list[Trajectory]:
    """What `rft.steps`, `rft.min_tokens`, `rft.max_per_problem` and `rft.share` leave, in this order; the order stays.

    Draws are by `seed` and a trajectory's own numbers: they stay when others come or go.
    """
    kept = [t for t in experts if len(t.response_ids) >= rft.min_tokens and _within(t.step, rft.steps)]
    if rft.max_per_problem:
        taken: dict[str, int] = {}
        chosen = set()
        for trajectory in _drawn(kept, seed, "experts of a problem"):
            taken[trajectory.problem_id] = taken.get(trajectory.problem_id, 0) + 1
            if taken[trajectory.problem_id] <= rft.max_per_problem:
                chosen.add(trajectory.key)
        kept = [t for t in kept if t.key in chosen]
    if rft.share < 1:
        chosen = {t.key for t in _drawn(kept, seed, "share of the experts")[: math.ceil(rft.share * len(kept))]}
        kept = [t for t in kept if t.key in chosen]
    return kept


def _within(step: int, steps: Sequence[int]) -> bool:
    return not steps or steps[0] <= step <= steps[1]


def _drawn(trajectories: Sequence[Trajectory], seed: int, purpose: str) -> list[Trajectory]:
    return sorted(trajectories, key=lambda t: derive_seed(seed, purpose, *t.key))
