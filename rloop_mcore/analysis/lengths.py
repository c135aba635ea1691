"""How response lengths drift over RL steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rloop_mcore.analysis.samples import Samples

QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of the responses of one RL step: `quantiles` are QUANTILES of all; the means are NaN without any."""

    iteration: int
    step: int
    quantiles: tuple[float, ...]
    mean_correct: float
    mean_wrong: float


def length_drift(samples: Samples) -> list[Lengths]:
    """One of each (iteration, step) in the cache, in order."""
    if not len(samples):
        return []
    place = samples.iteration.astype(np.int64) << 32 | samples.step.astype(np.int64)
    order = np.argsort(place, kind="stable")
    places, starts = np.unique(place[order], return_index=True)
    drift = []
    for key, rows in zip(places.tolist(), np.split(order, starts[1:]), strict=True):
        length, correct = samples.length[rows], samples.correct[rows]
        quantiles = tuple(float(value) for value in np.quantile(length, QUANTILES))
        drift.append(Lengths(key >> 32, key & 0xFFFFFFFF, quantiles, _mean(length[correct]), _mean(length[~correct])))
    return drift


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
