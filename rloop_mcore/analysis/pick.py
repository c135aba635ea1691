"""The checkpoint that validation picks of a run's, and the checkpoints that stand beside it."""

from __future__ import annotations

from collections.abc import Sequence

from rloop_mcore.algorithm.best_checkpoint import best_first
from rloop_mcore.analysis.read_run import Evaluation


def pick(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """The first by `algorithm.best_checkpoint`; `evaluations` are in the order of training. None without any."""
    return next(iter(best_first(evaluations)), None)


def base(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """theta_0."""
    return next((evaluation for evaluation in evaluations if evaluation.phase == "base"), None)


def last_theta(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """theta_I (theta_{i+1} of the last iteration whose exploitation has ended), what Algorithm 1 returns."""
    return _last(evaluations, "exploit")


def last_rl_policy(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """The last checkpoint of the last exploration phase."""
    return _last(evaluations, "explore")


ROLES = {"base": base, "picked by validation": pick, "last RL policy": last_rl_policy, "last θ": last_theta}


def _last(evaluations: Sequence[Evaluation], phase: str) -> Evaluation | None:
    return next((evaluation for evaluation in reversed(evaluations) if evaluation.phase == phase), None)
