"""Every training problem of a run in numbers: how often it was solved and when, if it was hard, if RFT had it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rloop_mcore.analysis import curves
from rloop_mcore.analysis.hard_set import hard_problems
from rloop_mcore.analysis.read_run import Run
from rloop_mcore.analysis.samples import Samples, read_samples

_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class TrainingProblems:
    """`step` [rows] is the RL step of each trajectory, from 1, over all iterations; `trained` [rows] the iteration
    whose RFT was trained on it, or -1. The others are [problems]: `first` is the RL step of the first success, `lost`
    says that there was one, but none in the last step that the problem was sampled in; `hard` and `used` (by RFT) have
    an array an iteration.
    """

    names: list[str]
    step: np.ndarray
    trained: np.ndarray
    asked: np.ndarray
    right: np.ndarray
    first: np.ndarray
    lost: np.ndarray
    hard: dict[int, np.ndarray]
    used: dict[int, np.ndarray]

    @classmethod
    def of(cls, run: Run, samples: Samples) -> TrainingProblems:
        """Of a run with trajectories."""
        before = [curves.steps_before(run, iteration) for iteration in range(int(samples.iteration.max()) + 1)]
        step = np.array(before)[samples.iteration] + samples.step + 1
        count, right = len(samples.problems), samples.correct
        first, last, now = np.full(count, _NEVER), np.full(count, -1), np.zeros(count, bool)
        np.minimum.at(first, samples.problem[right], step[right])
        np.maximum.at(last, samples.problem, step)
        now[samples.problem[right & (step == last[samples.problem])]] = True
        trained = _trained(run, samples)
        iterations = np.unique(samples.iteration).tolist()
        return cls(
            names=samples.problems,
            step=step,
            trained=trained,
            asked=np.bincount(samples.problem, minlength=count),
            right=np.bincount(samples.problem[right], minlength=count),
            first=first,
            lost=(first < _NEVER) & ~now,
            hard={i: hard_problems(samples, i, run.hard_threshold) for i in iterations},
            used={i: np.bincount(samples.problem[trained == i], minlength=count) > 0 for i in iterations},
        )

    def facts(self) -> list[dict[str, Any]]:
        """What the browser lists, a problem an entry; iterations count from 1 there."""
        return [
            {
                "id": name,
                "kind": "train",
                "asked": int(self.asked[number]),
                "right": int(self.right[number]),
                "hard": [iteration + 1 for iteration, those in self.hard.items() if those[number]],
                "rft": [iteration + 1 for iteration, those in self.used.items() if those[number]],
                "first": int(self.first[number]) if self.right[number] else None,
                "lost": bool(self.lost[number]),
            }
            for number, name in enumerate(self.names)
        ]


def _trained(run: Run, samples: Samples) -> np.ndarray:
    """The iteration whose RFT was trained on each trajectory [rows]; -1 for none."""
    trained = np.full(len(samples), -1)
    numbers = {name: number for number, name in enumerate(samples.problems)}
    keys = _keys(samples, samples.problem)
    order = np.argsort(keys)
    for folder in sorted((run.path / "experts").glob("i*")):
        experts = read_samples(folder)
        if len(experts):
            problem = np.array([numbers.get(name, -1) for name in experts.problems])[experts.problem]
            wanted = _keys(experts, problem)[problem >= 0]
            place = np.minimum(np.searchsorted(keys[order], wanted), len(keys) - 1)
            found = order[place]
            trained[found[keys[found] == wanted]] = int(folder.name[1:])
    return trained


def _keys(samples: Samples, problem: np.ndarray) -> np.ndarray:
    """(iteration, step, problem, sample) as one number each [rows]."""
    iteration, step, sample = (each.astype(np.int64) for each in (samples.iteration, samples.step, samples.sample))
    return iteration << 56 | step << 40 | problem.astype(np.int64) << 16 | sample
