"""Which of its policies a run keeps, and which is the best so far: functions of the journal alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rloop_mcore.algorithm.best_checkpoint import best_first
from rloop_mcore.config import CheckpointConfig
from rloop_mcore.journal import Journal
from rloop_mcore.types import PolicyName

Record = dict[str, Any]


@dataclass(frozen=True)
class Measurement:
    """A policy that was measured. `path` is as the journal has it; `metric` is its Avg@N's name, "" without one."""

    name: str
    iteration: int
    phase: str
    step: int
    path: str
    metric: str
    average: float


def best(records: Sequence[Record]) -> Measurement | None:
    """The checkpoint that validation picks of those measured so far; None where nothing was evaluated."""
    return next(iter(best_first([each for each in _measurements(records) if each.metric])), None)


def removed(records: Sequence[Record]) -> set[str]:
    """The paths of the policies that were removed."""
    return {path for record in records if record["event"] == "removed" for path in record["paths"]}


def removable(journal: Journal, config: CheckpointConfig) -> list[str]:
    """The paths of the policies that `checkpoint.keep_best` leaves no place for, oldest first.

    Kept are: the best ones, every theta, those of `checkpoint.policy_steps`, and the newest RL policy of an iteration
    whose exploitation isn't done: that may start from it, or be it.
    """
    if config.keep_best == 0:
        return []
    measured = _measurements(journal.records)
    endpoints = {each.iteration: each.path for each in measured if each.phase == "explore"}
    kept = {each.path for each in best_first(measured)[: config.keep_best]}
    kept |= {
        record["path"] for record in journal.records if record["event"] in ("policy", "commit") and "path" in record
    }
    kept |= {each.path for each in measured if each.phase == "explore" and each.step in config.policy_steps}
    kept |= {path for iteration, path in endpoints.items() if not journal.done(iteration, "exploit")}
    kept |= removed(journal.records)
    return [path for path in dict.fromkeys(each.path for each in measured) if path not in kept and _is_ours(path)]


def _is_ours(path: str) -> bool:
    """The model that the run started from is somebody's."""
    return path.startswith("policies/")


def _measurements(records: Sequence[Record]) -> list[Measurement]:
    """In the order of training."""
    measurements = []
    for record in records:
        if record["event"] == "measured":
            name = PolicyName.of(record["name"])
            assert name is not None, "a run measures policies under their names alone"
            metric = next((key for key in record["metrics"] if key.startswith("avg@")), "")
            average = record["metrics"].get(metric, 0.0)
            measurements.append(Measurement(str(name), *name, record["path"], metric, average))
    return measurements
