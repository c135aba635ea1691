"""The report's figures as Plotly specifications: plain dictionaries. Colours that follow the theme are the page's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from rloop_mcore.analysis import curves
from rloop_mcore.analysis.curves import Series, checkpoint_label
from rloop_mcore.analysis.pick import pick
from rloop_mcore.analysis.read_run import Run, average_key, pass_keys

# Okabe and Ito's palette, told apart with any colour vision; dashes and symbols repeat the distinction.
COLOURS = ("#0f83c9", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_SYMBOLS = ("circle", "square", "triangle-up", "cross", "x", "triangle-down")
_RL_STEP = "RL step (all iterations)"


@dataclass(frozen=True, slots=True)
class Figure:
    """`caption` is a sentence below the title; `spec` is {"data", "layout"} as Plotly takes it."""

    title: str
    caption: str
    spec: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    figures: list[Figure]


def sections(runs: Sequence[Run]) -> list[Section]:
    """Every figure the runs have data for, in the order of the report."""
    drawn = [
        Section("Generalisation over RL steps", _generalisation(runs)),
        Section("Generalisation by iteration", _by_iteration(runs)),
        Section("Stability", _training(runs, _STABILITY)),
        Section("Experience", [*_training(runs, _EXPERIENCE), *_experts(runs)]),
        Section("Cost", [*_training(runs, _COST), *_stages(runs)]),
    ]
    return [
        Section(section.title, [figure for figure in section.figures if figure.spec["data"]])
        for section in drawn
        if any(figure.spec["data"] for figure in section.figures)
    ]


def validation_metrics(runs: Sequence[Run]) -> list[str]:
    """Avg@n, then pass@k from the largest k down: the paper's figure 1 is the first of each."""
    known = {key: None for run in runs for evaluation in run.evaluations for key in evaluation.metrics}
    return [average_key(known), *reversed(pass_keys(known))] if known else []


# key of metrics.jsonl, title, caption, y axis, Plotly's y axis settings
_Training = tuple[str, str, str, str, dict[str, Any]]
_PERCENT: dict[str, Any] = {"tickformat": ".2~%", "rangemode": "tozero"}
_STABILITY: list[_Training] = [
    (
        "entropy",
        "Token entropy",
        "Mean over the response tokens trained on.",
        "nats per token",
        {"rangemode": "tozero"},
    ),
    ("grad_norm", "Gradient norm", "Before clipping.", "global L2 norm", {"rangemode": "tozero"}),
    (
        "skipped",
        "Updates skipped",
        "A loss or norm that was not finite, a norm over optimizer.skip_grad, or nothing to train on.",
        "updates",
        {"rangemode": "tozero"},
    ),
    ("clip_fraction", "Clipped tokens", "Importance ratio outside the clip range.", "share of tokens", _PERCENT),
    (
        "mismatch_mean",
        "Trainer–engine mismatch, mean",
        "Same tokens, same weights, first update of a step.",
        "mean |Δ log p| (nats)",
        {"type": "log", "exponentformat": "power"},
    ),
    (
        "mismatch_max",
        "Trainer–engine mismatch, maximum",
        "The worst token of a step; the run stops past rollout.mismatch_gate.",
        "max |Δ log p| (nats)",
        {"type": "log", "exponentformat": "power"},
    ),
]
_EXPERIENCE: list[_Training] = [
    ("reward_mean", "Training reward", "Mean of all samples, shaping included.", "reward", {}),
    ("response_length", "Response length", "Mean of all samples.", "tokens", {"rangemode": "tozero"}),
    (
        "groups_sampled",
        "Groups sampled",
        "What dynamic sampling needed to fill a batch.",
        "groups",
        {"rangemode": "tozero"},
    ),
    ("groups_kept", "Informative groups kept", "Neither all right nor all wrong.", "groups", {"rangemode": "tozero"}),
]
_COST: list[_Training] = [
    (
        "tokens_per_s",
        "Throughput",
        "Sampled tokens over the seconds of the step.",
        "tokens per second",
        {"rangemode": "tozero"},
    )
]


def _generalisation(runs: Sequence[Run]) -> list[Figure]:
    figures = _training(
        runs,
        [("success_rate", "Training success", "All samples, before groups are dropped.", "share correct", _PERCENT)],
    )
    for metric in validation_metrics(runs):
        figures.append(
            _lines(
                f"Validation {metric}",
                "Diamonds are the θ of each iteration, the star is the picked checkpoint; bars are 95 % intervals.",
                runs,
                lambda run, metric=metric: curves.validation(run, metric),  # type: ignore[misc]
                _RL_STEP,
                "share of problems" if metric.startswith("pass") else "share of samples correct",
                _PERCENT,
            )
        )
    return figures


def _by_iteration(runs: Sequence[Run]) -> list[Figure]:
    looped = [run for run in runs if any(evaluation.phase == "exploit" for evaluation in run.evaluations)]
    figures = []
    for metric in validation_metrics(looped):
        data = []
        for run in looped:
            index = runs.index(run)
            endpoints = _trace(curves.rl_endpoints(run, metric), f"{run.name}: RL endpoint", index, run)
            endpoints["line"]["dash"] = "dot"
            data += [_trace(curves.thetas(run, metric), f"{run.name}: θ", index, run), endpoints]
        layout = _layout("iterations done", metric, {**_PERCENT}) | {"shapes": []}
        layout["xaxis"] |= {"dtick": 1}
        figures.append(
            Figure(
                f"{metric} by iteration",
                "θ after each iteration, and the RL policy it explored with.",
                {"data": data, "layout": layout},
            )
        )
    return figures


def _training(runs: Sequence[Run], wanted: Sequence[_Training]) -> list[Figure]:
    return [
        _lines(title, caption, runs, lambda run, key=key: curves.training(run, key), _RL_STEP, unit, axis)  # type: ignore[misc]
        for key, title, caption, unit, axis in wanted
    ]


def _experts(runs: Sequence[Run]) -> list[Figure]:
    titles = {
        "experts": ("Expert trajectories", "Successes on hard problems that RFT was trained on.", "trajectories"),
        "problems": ("Hard problems with a success", "The problems those trajectories solve.", "problems"),
    }
    figures = []
    for key, (title, caption, unit) in titles.items():
        data = []
        for index, run in enumerate(runs):
            series = curves.experts(run, key)
            if any(series.y):
                marker = {"color": _colour(index)}
                data.append({"type": "bar", "name": escape(run.name), "x": series.x, "y": series.y, "marker": marker})
        layout = _layout("iteration", unit, {"rangemode": "tozero"}) | {"barmode": "group"}
        layout["xaxis"] |= {"dtick": 1}
        figures.append(Figure(title, caption, {"data": data, "layout": layout}))
    return figures


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
            "marker": {"color": _colour(index), "pattern": {"shape": ("", "/", "x", "-", ".", "+")[index % 6]}},
        }
        for index, stage in enumerate(dict.fromkeys(stage for totals in seconds for stage in totals))
    ]
    layout = _layout("seconds", "", {"automargin": True}) | {"barmode": "stack", "showlegend": True}
    layout["legend"] = {"traceorder": "normal"}
    return [Figure("Seconds by stage", "Over all logged steps.", {"data": data, "layout": layout})]


def _lines(
    title: str,
    caption: str,
    runs: Sequence[Run],
    series_of: Callable[[Run], Series],
    x_title: str,
    y_title: str,
    y_axis: dict[str, Any],
) -> Figure:
    drawn = [(index, run, series_of(run)) for index, run in enumerate(runs)]
    data = [_trace(series, run.name, index, run) for index, run, series in drawn if series]
    layout = _layout(x_title, y_title, y_axis)
    resets = sorted({step for _, run, series in drawn if series for step in curves.iteration_starts(run)})
    layout["shapes"] = [
        {
            "type": "line",
            "x0": step,
            "x1": step,
            "yref": "paper",
            "y0": 0,
            "y1": 1,
            "layer": "below",
            "line": {"color": "rgba(128,128,128,0.5)", "width": 1, "dash": "dot"},
        }
        for step in resets
    ]
    return Figure(title, caption, {"data": data, "layout": layout})


def _trace(series: Series, name: str, index: int, run: Run) -> dict[str, Any]:
    trace: dict[str, Any] = {
        "type": "scatter",
        "name": escape(name),
        "x": series.x,
        "y": series.y,
        "mode": "lines",
        "line": {"color": _colour(index), "dash": _DASHES[index % len(_DASHES)], "width": 2},
    }
    if not series.labels:
        return trace
    picked = pick(run.evaluations)
    star = checkpoint_label(picked) if picked else None
    symbols = [_symbol(label, label == star, index) for label in series.labels]
    sizes = [14 if label == star else 9 for label in series.labels]
    bars = {
        "type": "data",
        "symmetric": False,
        "array": [_difference(high, y) for high, y in zip(series.high, series.y, strict=True)],
        "arrayminus": [_difference(y, low) for low, y in zip(series.low, series.y, strict=True)],
        "thickness": 1,
        "width": 0,
    }
    return trace | {
        "mode": "lines+markers",
        "marker": {"symbol": symbols, "size": sizes, "color": _colour(index), "line": {"width": 0}, "opacity": 1},
        "text": series.labels,
        "error_y": bars,
        "hovertemplate": "%{text}<br>%{y:.1%} +%{error_y.array:.1%} −%{error_y.arrayminus:.1%}",
    }


def _symbol(label: str, picked: bool, index: int) -> str:
    if picked:
        return "star"
    return "diamond" if label.startswith("θ") else _SYMBOLS[index % len(_SYMBOLS)]


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _layout(x_title: str, y_title: str, y_axis: dict[str, Any]) -> dict[str, Any]:
    return {"xaxis": {"title": {"text": x_title}}, "yaxis": {"title": {"text": y_title}, **y_axis}}


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]
