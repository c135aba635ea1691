"""A curriculum: a problem is drawn the less, the surer its next group is to be all right, which teaches nothing.

The chance of that is Laplace's: with any success rate as likely as another beforehand, s successes of n samples make
the next one right with probability (s + 1) / (n + 2), and so on. A problem that nobody has solved keeps its full
weight: RLoop's experts come from such ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from rloop_mcore.types import Problem, Visit

RECENT = 4  # visits that count: the policy that made older ones is another


def weights(problems: Sequence[Problem], visits: Mapping[str, Sequence[Visit]]) -> list[float]:
    """1 - P(the next group is all right) [problems]; 1 for a problem that was never drawn."""
    return [1 - all_right(visits[problem.id][-RECENT:]) for problem in problems]


def all_right(recent: Sequence[Visit]) -> float:
    """The chance that as many samples as at the last visit are all right; 0 where there was none."""
    if not recent:
        return 0.0
    samples = sum(visit.samples for visit in recent)
    successes = sum(visit.successes for visit in recent)
    return prod((successes + 1 + k) / (samples + 2 + k) for k in range(recent[-1].samples))
