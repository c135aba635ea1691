"""Two runs side by side: what their configurations differ in, and what each forgets between the same RL steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rloop_mcore.analysis.checkpoints import Checkpoints, common_steps, rl_checkpoints
from rloop_mcore.analysis.forgetting import block_averages, forgetting_matrix
from rloop_mcore.analysis.read_run import Run


@dataclass(frozen=True, slots=True)
class AlignedForgetting:
    """Forgetting matrices of a run of one iteration (vanilla) and one of several (RLoop) over the same RL steps.

    Both are [places, places] over the problems that every checkpoint of both was asked. `places` index RLoop's
    checkpoints, `iterations` are theirs: vanilla's steps are cut into the same windows.
    """

    places: list[int]
    iterations: list[int]
    vanilla: np.ndarray
    rloop: np.ndarray


def aligned_forgetting(vanilla: Checkpoints, rloop: Checkpoints) -> AlignedForgetting | None:
    """None where the runs share less than two RL steps with evaluations, or no problem."""
    theirs, mine = common_steps(vanilla, rloop)
    common = set(vanilla.problems) & set(rloop.problems)
    if len(mine) < 2 or not common:
        return None
    matrices = [
        forgetting_matrix(of.solved[places][:, [name in common for name in of.problems]])  # both are sorted
        for of, places in ((vanilla, theirs), (rloop, mine))
    ]
    return AlignedForgetting(mine, [rloop.iterations[place] for place in mine], *matrices)


def comparable(runs: Sequence[Run], found: Sequence[Checkpoints]) -> Iterator[tuple[int, int, AlignedForgetting]]:
    """(vanilla, rloop, both aligned): the first run of one iteration with each run of several, as places in `runs`.

    A run of several that is still in its first is neither. Runs that were asked different problems under one id are not
    comparable.
    """
    evaluated = [len(set(each.iterations)) if len(each) > 1 else 0 for each in found]
    planned = [run.settings.get("algorithm", {}).get("iterations", 1) for run in runs]
    kinds = list(zip(evaluated, planned, strict=True))
    if (1, 1) not in kinds:
        return
    one = kinds.index((1, 1))
    for other, iterations in enumerate(evaluated):
        if iterations < 2 or clashing_ids(runs[one], runs[other]):
            continue
        if (aligned := aligned_forgetting(found[one], found[other])) is not None:
            yield one, other, aligned


def clashing_ids(first: Run, second: Run) -> list[str]:
    """The ids under which the two runs' evaluations asked different problems, as far as they say what they asked."""
    mine, theirs = ({id: of for each in run.evaluations for id, of in each.problems.items()} for run in (first, second))
    return [id for id, of in mine.items() if theirs.get(id, of) != of]


def block_forgetting(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The mean forgetting of each comparable run within and between iterations; null where there are no such pairs."""
    rows = []
    for one, other, aligned in comparable(runs, [rl_checkpoints(run) for run in runs]):
        for place, values in ((one, aligned.vanilla), (other, aligned.rloop)):
            intra, inter = (None if np.isnan(v) else float(v) for v in block_averages(values, aligned.iterations))
            rows.append({"run": runs[place].name, "intra": intra, "inter": inter})
    return rows


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The keys of the configurations that differ between the runs, with a value a run."""
    flat = [_flat(run.settings) for run in runs]
    keys = sorted({key for each in flat for key in each} - {"run.dir"})
    values = {key: [str(each.get(key, "–")) for each in flat] for key in keys}
    return {key: found for key, found in values.items() if len(set(found)) > 1}


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
