"""The paper's matrices over checkpoints, and the curves that they hold."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from rloop_mcore.analysis.checkpoints import Checkpoints, rl_checkpoints
from rloop_mcore.analysis.compare import comparable
from rloop_mcore.analysis.coverage import coverage
from rloop_mcore.analysis.curves import Series
from rloop_mcore.analysis.forgetting import block_averages, differential_matrix, forgetting_matrix, learning_matrix
from rloop_mcore.analysis.plots import (
    DASHES,
    FROM_ZERO,
    PERCENT,
    RL_STEP,
    Figure,
    fill,
    layout,
    lines,
    matrix,
    resets,
    stroke,
    trace,
)
from rloop_mcore.analysis.read_run import Run
from rloop_mcore.analysis.similarity import without_self_pairs


def memory_figures(runs: Sequence[Run]) -> list[Figure]:
    """Coverage, learning and forgetting of each run with two checkpoints or more, and the difference of two runs."""
    found = [rl_checkpoints(run) for run in runs]
    learned = [learning_matrix(each.solved) for each in found]
    forgot = [forgetting_matrix(each.solved) for each in found]
    figures = [_coverage(runs, found)]
    largest = max((float(np.nanmax(each)) for each in [*learned, *forgot] if len(each) > 1), default=0.0)
    for name, what, matrices in (
        ("Learning", "solved at j and not at i", learned),
        ("Forgetting", "solved at i and not at j", forgot),
    ):
        for run, each, values in zip(runs, found, matrices, strict=True):
            if len(each) > 1:
                caption = (
                    f"Share of {len(each.problems)} validation problems {what}; solved: at least one correct sample."
                )
                title = f"{name}: {run.name}"
                figures.append(matrix(title, caption, values, each.names, each.iterations, largest))
    return [*figures, *_differences(runs, found)]


def diversity_figures(runs: Sequence[Run]) -> list[Figure]:
    """Similarity within and between checkpoints, and the number of different correct solutions."""
    found = [rl_checkpoints(run) for run in runs]
    compared = [each.similarity() for each in found]
    largest = max((float(np.nanmax(values)) for _, problems, _, values in compared if problems), default=1.0)
    figures, within = [], []
    for run, each, (places, problems, samples, values) in zip(runs, found, compared, strict=True):
        names = [each.names[place] for place in places]
        some = "" if len(places) == len(each) else f" {len(places)} of {len(each)} checkpoints are shown."
        caption = f"Bigram Jaccard similarity of the solutions to {problems} validation problems, all pairs.{some}"
        iterations = [each.iterations[place] for place in places]
        if problems and len(places) > 1:
            title = f"Similarity: {run.name}"
            figures.append(matrix(title, caption, values, names, iterations, largest, unit=".3f"))
        diagonal = list(map(without_self_pairs, np.diag(values), samples)) if problems else []
        within.append(Series([each.rl_steps[place] for place in places] if problems else [], _known(diagonal)))
    caption = "Mean similarity of two different solutions of one checkpoint to one problem: lower is more diverse."
    figures.append(lines("Similarity within a checkpoint", caption, runs, within, "Jaccard", {}))
    distinct = [Series(each.rl_steps, _known(each.distinct)) for each in found]
    caption = "Different correct responses to a validation problem, mean over all problems."
    figures.append(lines("Distinct solutions", caption, runs, distinct, "solutions", FROM_ZERO))
    return figures


def _coverage(runs: Sequence[Run], found: Sequence[Checkpoints]) -> Figure:
    data = []
    for index, (run, each) in enumerate(zip(runs, found, strict=True)):
        shares = coverage(each.solved)
        named = {"ever solved": shares.ever, "solved now": shares.now, "lost": shares.lost}
        for number, (name, values) in enumerate(named.items() if len(each) > 1 else ()):
            drawn = trace(Series(each.rl_steps, _known(values)), f"{run.name}: {name}", index, run)
            drawn["line"] = stroke(index, DASHES[number])
            data.append(drawn)
    axes = layout(RL_STEP, "share of problems", PERCENT) | {"shapes": resets(runs)}
    caption = "Validation problems solved by an RL checkpoint until now, by this one, and by an earlier one only."
    return Figure("Coverage", caption, {"data": data, "layout": axes})


def _differences(runs: Sequence[Run], found: Sequence[Checkpoints]) -> list[Figure]:
    """Of runs of one iteration and of several: the differential matrices, and the means of their blocks."""
    figures: list[Figure] = []
    blocks: dict[str, dict[str, Any]] = {}
    for one, other, aligned in comparable(runs, found):
        vanilla, rloop = runs[one].name, runs[other].name
        values = differential_matrix(aligned.vanilla, aligned.rloop)
        intra, inter = block_averages(values, aligned.iterations)
        caption = (
            f"Share of problems that {vanilla} forgets minus the share that {rloop} does, between the same RL steps: "
            f"{_points(intra)} within an iteration, {_points(inter)} between iterations."
        )
        names = [found[other].names[place] for place in aligned.places]
        largest = float(np.nanmax(np.abs(values)))
        title = f"Differential forgetting: {vanilla} − {rloop}"
        figures.append(matrix(title, caption, values, names, aligned.iterations, largest, unit="+.1%", signed=True))
        for index, name, of in ((one, vanilla, aligned.vanilla), (other, rloop, aligned.rloop)):
            bar = {"type": "bar", "name": escape(name), "x": ["within an iteration", "between iterations"]}
            y = _known(block_averages(of, aligned.iterations))
            blocks[name] = bar | {"y": y, "marker": fill(index)}
    axes = layout("", "mean forgetting", PERCENT) | {"barmode": "group", "showlegend": True}
    caption = "Mean of the forgetting matrices over pairs of the same RL steps; vanilla RL's steps are cut alike."
    data = list(blocks.values())
    return [*figures, Figure("Forgetting within and between iterations", caption, {"data": data, "layout": axes})]


def _known(values: Sequence[float] | np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 6) for value in values]


def _points(value: float) -> str:
    return "unknown" if np.isnan(value) else f"{100 * value:+.1f} points"
