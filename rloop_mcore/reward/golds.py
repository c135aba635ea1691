"""Gold answers that don't verify against themselves: nobody can earn the reward of such a problem."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rloop_mcore.config import RewardConfig
from rloop_mcore.reward.math import compare_symbolically
from rloop_mcore.reward.pool import RewardPool
from rloop_mcore.types import Problem, Verdict


def unverifiable(problems: Sequence[Problem], config: RewardConfig) -> dict[str, str]:
    """The ids of problems whose gold the math verifier does not call equal to itself, each with the verdict's reason.

    None for other verifiers, which alone know what their golds are. Equal text does not count here, though it does in
    grading: a gold that only its own spelling can match teaches spelling.
    """
    if config.verifier != "math" or not problems:
        return {}
    checking = dataclasses.replace(config, verifier=f"{__name__}:verify_gold", max_failure_share=1.0)
    with RewardPool(checking) as pool:
        verdicts = pool.grade([(problem, "", False) for problem in problems])
    return {p.id: verdict.reason for p, verdict in zip(problems, verdicts, strict=True) if not verdict.correct}


def verify_gold(problem: Problem, response: str, truncated: bool, answer_format: str) -> Verdict:
    """A verifier of the pool's kind: the gold against itself."""
    return compare_symbolically(problem.answer, problem.answer)
