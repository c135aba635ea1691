"""Figures of the trajectory cache: response lengths, and the problems that stay hard."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from rloop_mcore.analysis import curves
from rloop_mcore.analysis.hard_set import HardSet, hard_sets
from rloop_mcore.analysis.lengths import QUANTILES, Lengths, length_drift
from rloop_mcore.analysis.plots import (
    DASHES,
    FROM_ZERO,
    PERCENT,
    RL_STEP,
    Figure,
    colour,
    fill,
    layout,
    resets,
    shape_of,
    stroke,
)
from rloop_mcore.analysis.read_run import Run
from rloop_mcore.analysis.samples import read_samples, shard_paths

_PARTS = {"never": "no success", "hard": "hard: some successes", "others": "the others"}


def length_figures(runs: Sequence[Run]) -> list[Figure]:
    """Quantiles of the response lengths, and the means of right and wrong responses."""
    spread: list[dict[str, Any]] = []
    means: list[dict[str, Any]] = []
    for index, run in enumerate(runs):
        drift, _ = _of_cache(run)
        if not drift:
            continue
        x = [curves.steps_before(run, each.iteration) + each.step + 1 for each in drift]
        for number, quantile in enumerate(QUANTILES):
            name, y = f"{run.name}: {quantile:.0%}", [each.quantiles[number] for each in drift]
            spread.append(_line(name, x, y, index, ("dot", "solid", "dash")[number]))
        for number, (name, y) in enumerate(
            {"right": [each.mean_correct for each in drift], "wrong": [each.mean_wrong for each in drift]}.items()
        ):
            means.append(_line(f"{run.name}: {name}", x, y, index, DASHES[number]))
    shapes = resets(runs)
    return [
        Figure(
            "Response length, spread",
            "Quantiles of all samples of a step: drift that the mean hides.",
            {"data": spread, "layout": layout(RL_STEP, "tokens", FROM_ZERO) | {"shapes": shapes}},
        ),
        Figure(
            "Response length, right and wrong",
            "Means of the correct and of the other samples of a step.",
            {"data": means, "layout": layout(RL_STEP, "tokens", FROM_ZERO) | {"shapes": shapes}},
        ),
    ]


def hard_set_figures(runs: Sequence[Run]) -> list[Figure]:
    """What the problems of each exploration come to, and how the hard ones change."""
    figures, turnover = [], []
    for index, run in enumerate(runs):
        _, sets = _of_cache(run)
        if not sets:
            continue
        x = [each.iteration + 1 for each in sets]
        data = [
            {
                "type": "bar",
                "name": name,
                "x": x,
                "y": [getattr(each, part) for each in sets],
                "marker": {"color": colour(number), "pattern": {"shape": ("/", "", ".")[number]}},
            }
            for number, (part, name) in enumerate(_PARTS.items())
        ]
        axes = layout("iteration", "problems", FROM_ZERO) | {"barmode": "stack"}
        axes["xaxis"] |= {"dtick": 1}
        caption = f"By successes over the whole exploration; hard: some, at a rate below {run.hard_threshold:.0%}."
        figures.append(Figure(f"Problems by difficulty: {run.name}", caption, {"data": data, "layout": axes}))
        if len(sets) > 1:
            y = [None if np.isnan(each.turnover) else each.turnover for each in sets[1:]]
            text = [f"{each.entered} came, {each.stayed} stayed, {each.left} went" for each in sets[1:]]
            bar = {"type": "bar", "name": escape(run.name), "x": x[1:], "y": y, "text": text, "textposition": "none"}
            hover = "%{y:.0%}: %{text}<extra></extra>"
            turnover.append(bar | {"marker": fill(index), "hovertemplate": hover})
    axes = layout("iteration", "turnover", PERCENT) | {"barmode": "group"}
    axes["xaxis"] |= {"dtick": 1}
    caption = "1 − |hard now and in the iteration before| / |hard now or then|."
    return [*figures, Figure("Turnover of the hard problems", caption, {"data": turnover, "layout": axes})]


def _of_cache(run: Run) -> tuple[list[Lengths], list[HardSet]]:
    folder = run.path / "cache"
    return _analysed(folder, tuple(path.name for path in shard_paths(folder)), run.hard_threshold)


@lru_cache(maxsize=16)
def _analysed(folder: Path, shards: tuple[str, ...], threshold: float) -> tuple[list[Lengths], list[HardSet]]:
    """`shards` are what is there: with others the cache is read again."""
    samples = read_samples(folder)
    return length_drift(samples), hard_sets(samples, threshold)


def _line(name: str, x: list[int], y: list[float], index: int, dash: str) -> dict[str, Any]:
    values = [None if np.isnan(value) else round(value, 3) for value in y]
    line = {"name": escape(name), "x": x, "y": values, "line": stroke(index, dash)}
    return {"type": "scatter", **shape_of(values), **line}
