"""The one rule by which validation picks a run's checkpoint, and the checkpoints that stand beside it."""

from __future__ import annotations

from collections.abc import Sequence

from rloop_mcore.analysis.read_run import Evaluation

RULE = "the highest validation Avg@N of all evaluated checkpoints, RL and RFT alike; of equals the earlier"


def pick(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """The checkpoint with the highest validation Avg@N; of equals the earlier one (RLoop section 5.1).

    `evaluations` are in the order of training. RL and RFT checkpoints are treated alike; theta_0 is not a result of
    the run and is picked only where nothing else was evaluated. None without evaluations.
    """
    trained = [evaluation for evaluation in evaluations if evaluation.phase != "base"]
    return max(trained or evaluations, key=lambda evaluation: evaluation.average, default=None)


def base(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """theta_0."""
    return next((evaluation for evaluation in evaluations if evaluation.phase == "base"), None)


def last_theta(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """theta_I (theta_{i+1} of the last iteration whose exploitation has ended), what Algorithm 1 returns."""
    return _last(evaluations, "exploit")


def last_rl_policy(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """The last checkpoint of the last exploration phase."""
    return _last(evaluations, "explore")


def _last(evaluations: Sequence[Evaluation], phase: str) -> Evaluation | None:
    return next((evaluation for evaluation in reversed(evaluations) if evaluation.phase == phase), None)
