"""Which of a run's trajectories are worth showing where not all can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rloop_mcore.analysis.checkpoints import spread
from rloop_mcore.analysis.training_problems import TrainingProblems

PROBLEMS = 48  # training problems with responses, and as many validation problems
RESPONSES = 4  # to a problem in one step, or of one checkpoint
_CHARACTERS_A_TOKEN = 4


@dataclass(frozen=True, slots=True)
class Wanted:
    """A response to show; `rank` orders those of a visit (a step's, or a checkpoint's, to one problem)."""

    rank: int
    problem: int
    visit: int
    row: int
    length: int


def interesting(problems: TrainingProblems, there: np.ndarray) -> list[int]:
    """At most PROBLEMS of those `there` [problems]: what RFT was trained on, hard ones, never solved ones, and others.

    Each kind is spread over success rates.
    """
    order = np.lexsort((-problems.asked, problems.right / np.maximum(problems.asked, 1)))
    used, hard = (np.any(list(each.values()), axis=0) for each in (problems.used, problems.hard))
    chosen: list[int] = []
    for kind, share in ((used, 1 / 3), (hard, 1 / 2), (problems.right == 0, 2 / 3), (there, 1.0)):
        taken = set(chosen)
        mine = [int(number) for number in order if there[number] and kind[number] and int(number) not in taken]
        chosen += [mine[place] for place in spread(len(mine), max(0, round(PROBLEMS * share) - len(chosen)))]
    return sorted(chosen)


def telling(rows: np.ndarray, correct: np.ndarray, trained: np.ndarray) -> list[int]:
    """At most RESPONSES of the rows: what RFT took, then right and wrong in turn."""
    first, rights, wrongs = rows[trained].tolist(), rows[correct & ~trained].tolist(), rows[~correct].tolist()
    turns = [row for pair in zip(rights, wrongs, strict=False) for row in pair]
    rest = rights[len(wrongs) :] + wrongs[len(rights) :]
    return (first + turns + rest)[:RESPONSES]


def within(wanted: Sequence[Wanted], characters: int) -> list[Wanted]:
    """As many as fit, the first of each visit before the second of any."""
    kept, total = [], 0
    for each in sorted(wanted, key=lambda one: one.rank):
        total += each.length * _CHARACTERS_A_TOKEN
        if total > characters:
            break
        kept.append(each)
    return sorted(kept, key=lambda one: (one.problem, one.visit, one.rank))
