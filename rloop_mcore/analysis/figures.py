"""The report's figures, in its order; each is drawn where the runs have data for it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from rloop_mcore.analysis import curves
from rloop_mcore.analysis.experience_figures import hard_set_figures, length_figures
from rloop_mcore.analysis.matrix_figures import diversity_figures, memory_figures
from rloop_mcore.analysis.plots import (
    FROM_ZERO,
    PATTERNS,
    PERCENT,
    Figure,
    Section,
    bars,
    colour,
    layout,
    lines,
    trace,
    turn,
)
from rloop_mcore.analysis.read_run import Run, average_keys, pass_keys


def sections(runs: Sequence[Run]) -> list[Section]:
    """Every figure the runs have data for, in the order of the report."""
    drawn = [
        Section("Generalisation over RL steps", _generalisation(runs)),
        Section("Generalisation by iteration", _by_iteration(runs)),
        Section("Learning and forgetting", memory_figures(runs)),
        Section("Diversity", [*diversity_figures(runs), *_training(runs, _DIVERSITY)]),
        Section("Stability", _training(runs, _STABILITY)),
        Section("Experience", _experience(runs)),
        Section("Cost", [*_training(runs, _COST), *_stages(runs)]),
    ]
    return [
        Section(section.title, [figure for figure in section.figures if figure.spec["data"]])
        for section in drawn
        if any(figure.spec["data"] for figure in section.figures)
    ]


def validation_metrics(runs: Sequence[Run]) -> list[str]:
    """Avg@n, then pass@k from the largest k down: the paper's figure 1 is the first of each.

    Several Avg@n where runs were evaluated with different numbers of samples.
    """
    known = {key: None for run in runs for evaluation in run.evaluations for key in evaluation.metrics}
    return [*average_keys(known), *reversed(pass_keys(known))]


# key of metrics.jsonl, title, caption, y axis, Plotly's y axis settings
_Training = tuple[str, str, str, str, dict[str, Any]]
_LOG: dict[str, Any] = {"type": "log", "exponentformat": "power"}
_DIVERSITY: list[_Training] = [
    ("entropy", "Token entropy", "Mean over the response tokens trained on.", "nats per token", FROM_ZERO)
]
_STABILITY: list[_Training] = [
    ("grad_norm", "Gradient norm", "Before clipping.", "global L2 norm", FROM_ZERO),
    (
        "skipped",
        "Updates skipped",
        "A loss or norm that was not finite, a norm over optimizer.skip_grad, or nothing to train on.",
        "updates",
        FROM_ZERO,
    ),
    ("clip_fraction", "Clipped tokens", "Importance ratio outside the clip range.", "share of tokens", PERCENT),
    (
        "mismatch_mean",
        "Trainer–engine mismatch, mean",
        "Same tokens, same weights, first update of a step.",
        "mean |Δ log p| (nats)",
        _LOG,
    ),
    (
        "mismatch_max",
        "Trainer–engine mismatch, maximum",
        "The worst token of a step; the run stops past rollout.mismatch_gate.",
        "max |Δ log p| (nats)",
        _LOG,
    ),
]
_EXPERIENCE: list[_Training] = [
    ("reward_mean", "Training reward", "Mean of all samples, shaping included.", "reward", {}),
    ("response_length", "Response length", "Mean of all samples.", "tokens", FROM_ZERO),
    ("groups_sampled", "Groups sampled", "What dynamic sampling needed to fill a batch.", "groups", FROM_ZERO),
    ("groups_kept", "Informative groups kept", "Neither all right nor all wrong.", "groups", FROM_ZERO),
]
_COST: list[_Training] = [
    ("tokens_per_s", "Throughput", "Sampled tokens over the seconds of the step.", "tokens per second", FROM_ZERO)
]


def _generalisation(runs: Sequence[Run]) -> list[Figure]:
    figures = _training(
        runs,
        [("success_rate", "Training success", "All samples, before groups are dropped.", "share correct", PERCENT)],
    )
    metrics = validation_metrics(runs)
    figures += [_validation(runs, metric) for metric in metrics]
    headlines = metrics[: len(average_keys(dict.fromkeys(metrics))) + 1]  # Avg@n and the pass@k of the largest k
    sources = dict.fromkeys(source for run in runs for evaluation in run.evaluations for source in evaluation.sources)
    figures += [_validation(runs, metric, source) for source in sources for metric in headlines]
    gaps = [curves.overfitting_gap(run) for run in runs]
    caption = "Training success since the checkpoint before, minus validation Avg@N: growing is overfitting."
    figures.append(lines("Overfitting gap", caption, runs, gaps, "difference", {"tickformat": ".2~%"}))
    return figures


def _validation(runs: Sequence[Run], metric: str, source: str | None = None) -> Figure:
    return lines(
        f"Validation {metric}" + (f", {source}" if source else ""),
        "Diamonds are the θ of each iteration, the star is the picked checkpoint; bars are 95 % intervals.",
        runs,
        [curves.validation(run, metric, source) for run in runs],
        "share of problems" if metric.startswith("pass") else "share of samples correct",
        PERCENT,
    )


def _by_iteration(runs: Sequence[Run]) -> list[Figure]:
    looped = [run for run in runs if any(evaluation.phase == "exploit" for evaluation in run.evaluations)]
    figures = []
    for metric in validation_metrics(looped):
        data = []
        for run in looped:
            index = runs.index(run)
            endpoints = trace(curves.rl_endpoints(run, metric), f"{run.name}: RL endpoint", index, run)
            endpoints["line"]["dash"] = "dot"
            data += [trace(curves.thetas(run, metric), f"{run.name}: θ", index, run), endpoints]
        axes = layout("iterations done", metric, PERCENT)
        axes["xaxis"] |= {"dtick": 1}
        figures.append(
            Figure(
                f"{metric} by iteration",
                "θ after each iteration, and the RL policy it explored with.",
                {"data": data, "layout": axes},
            )
        )
    return figures


def _training(runs: Sequence[Run], wanted: Sequence[_Training]) -> list[Figure]:
    return [
        lines(title, caption, runs, [curves.training(run, key) for run in runs], unit, axis)
        for key, title, caption, unit, axis in wanted
    ]


def _experience(runs: Sequence[Run]) -> list[Figure]:
    titles = {
        "experts": ("Expert trajectories", "Successes on hard problems that RFT was trained on.", "trajectories"),
        "problems": ("Problems of the experts", "The problems those trajectories solve.", "problems"),
    }
    figures = []
    for key, (title, caption, unit) in titles.items():
        axes = layout("iteration", unit, FROM_ZERO) | {"barmode": "group"}
        axes["xaxis"] |= {"dtick": 1}
        data = bars(runs, [curves.experts(run, key) for run in runs])
        figures.append(Figure(title, caption, {"data": data, "layout": axes}))
    return [*_training(runs, _EXPERIENCE), *length_figures(runs), *figures, *hard_set_figures(runs)]


def _stages(runs: Sequence[Run]) -> list[Figure]:
    seconds = [curves.seconds_by_stage(run) for run in runs]
    names = [escape(run.name) for run in runs]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "name": stage,
            "y": names,
            "x": [totals.get(stage, 0.0) for totals in seconds],
            "marker": {"color": colour(index), "pattern": {"shape": PATTERNS[turn(index)]}},
        }
        for index, stage in enumerate(dict.fromkeys(stage for totals in seconds for stage in totals))
    ]
    axes = layout("seconds", "", {"automargin": True}) | {"barmode": "stack", "showlegend": True}
    axes["legend"] = {"traceorder": "normal"}
    return [Figure("Seconds by stage", "Over all logged steps.", {"data": data, "layout": axes})]
