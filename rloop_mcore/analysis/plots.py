"""Plotly specifications, as plain dictionaries: lines with intervals, bars, matrices. Themes are the page's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from rloop_mcore.analysis import curves
from rloop_mcore.analysis.curves import Series, checkpoint_label
from rloop_mcore.analysis.pick import pick
from rloop_mcore.analysis.read_run import Run

# Okabe and Ito's palette, told apart with any colour vision; dashes and symbols repeat the distinction.
COLOURS = ("#0f83c9", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DIVERGING = [[0, "#0f83c9"], [0.5, "#f4f4f4"], [1, "#d55e00"]]
PATTERNS = ("", "/", "x", "-", ".", "+")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_DASH_LENGTHS = ("", "9 9", "3 3", "9 3 3 3", "15 15", "15 6 3 6")  # of these, as Plotly draws them at width 2
RL_STEP = "RL step (all iterations)"
PERCENT: dict[str, Any] = {"tickformat": ".2~%", "rangemode": "tozero"}
FROM_ZERO: dict[str, Any] = {"rangemode": "tozero"}
_SYMBOLS = ("circle", "square", "triangle-up", "cross", "x", "triangle-down")


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


def lines(
    title: str,
    caption: str,
    runs: Sequence[Run],
    series: Sequence[Series],
    y_title: str,
    y_axis: dict[str, Any],
) -> Figure:
    """A curve of each run over RL steps; those without a value are left out. Dotted lines: where iterations begin."""
    drawn = [(index, run, each) for index, (run, each) in enumerate(zip(runs, series, strict=True)) if each]
    data = [trace(each, run.name, index, run) for index, run, each in drawn]
    axes = layout(RL_STEP, y_title, y_axis)
    axes["shapes"] = resets([run for _, run, _ in drawn])
    return Figure(title, caption, {"data": data, "layout": axes})


def resets(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Vertical lines where an iteration begins."""
    steps = sorted({step for run in runs for step in curves.iteration_starts(run)})
    return [
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
        for step in steps
    ]


def bars(runs: Sequence[Run], series: Sequence[Series]) -> list[dict[str, Any]]:
    """A group of bars of each run that has any."""
    return [
        {"type": "bar", "name": escape(run.name), "x": each.x, "y": each.y, "marker": fill(index)}
        for index, (run, each) in enumerate(zip(runs, series, strict=True))
        if any(each.y)
    ]


def matrix(
    title: str,
    caption: str,
    values: np.ndarray,
    labels: Sequence[str],
    iterations: Sequence[int],
    largest: float,
    unit: str = ".1%",
    signed: bool = False,
) -> Figure:
    """values [checkpoints, checkpoints] in colours, NaN left out; lines stand where a new iteration begins.

    The scale runs from 0 to `largest`, or from -largest to largest about a neutral 0 where `signed`.
    """
    largest = largest or 1.0  # where all are 0, they are the scale's 0
    heatmap = {
        "type": "heatmap",
        "z": [[None if np.isnan(value) else round(float(value), 5) for value in row] for row in values],
        "x": list(labels),
        "y": list(labels),
        "zmin": -largest if signed else 0,
        "zmax": largest,
        "colorscale": DIVERGING if signed else "Cividis",
        "xgap": 1,
        "ygap": 1,
        "hovertemplate": f"from %{{y}} to %{{x}}: %{{z:{unit}}}<extra></extra>",
        "colorbar": {"tickformat": unit, "thickness": 12, "outlinewidth": 0},
    }
    axes = layout("j: checkpoint (iteration · step)", "i", {"autorange": "reversed", "type": "category"})
    axes["xaxis"] |= {"type": "category", "showgrid": False}
    axes["yaxis"] |= {"showgrid": False}
    edges = [place for place in range(1, len(iterations)) if iterations[place] != iterations[place - 1]]
    line = {"type": "line", "line": {"color": "rgba(128,128,128,0.9)", "width": 1.5}}
    across = {"xref": "paper", "x0": 0, "x1": 1}
    down = {"yref": "paper", "y0": 0, "y1": 1}
    axes["shapes"] = [line | across | {"y0": edge - 0.5, "y1": edge - 0.5} for edge in edges]
    axes["shapes"] += [line | down | {"x0": edge - 0.5, "x1": edge - 0.5} for edge in edges]
    return Figure(title, caption, {"data": [heatmap], "layout": axes})


def trace(series: Series, name: str, index: int, run: Run) -> dict[str, Any]:
    """A curve in the index-th colour; with labels, its points are checkpoints with intervals."""
    curve: dict[str, Any] = {
        "type": "scatter",
        "name": escape(name),
        "x": series.x,
        "y": series.y,
        **shape_of(series.y),
        "line": {"color": colour(index), "dash": DASHES[turn(index)], "width": 2},
    }
    if not series.labels:
        return curve
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
    return curve | {
        "mode": "lines+markers",
        "marker": {"symbol": symbols, "size": sizes, "color": colour(index), "line": {"width": 0}, "opacity": 1},
        "text": series.labels,
        "error_y": bars,
        "hovertemplate": "%{text}<br>%{y:.1%} +%{error_y.array:.1%} −%{error_y.arrayminus:.1%}",
    }


def shape_of(y: Sequence[float | None]) -> dict[str, Any]:
    """A line; with points too where some have no neighbour, as of these a line shows nothing."""
    padded = [None, *y, None]
    if not any(padded[i] is not None and padded[i - 1] is padded[i + 1] is None for i in range(1, len(padded) - 1)):
        return {"mode": "lines"}
    return {"mode": "lines+markers", "marker": {"size": 5}}


def _symbol(label: str, picked: bool, index: int) -> str:
    if picked:
        return "star"
    return "diamond" if label.startswith("θ") else _SYMBOLS[turn(index)]


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def layout(x_title: str, y_title: str, y_axis: dict[str, Any]) -> dict[str, Any]:
    """Two titled axes."""
    return {"xaxis": {"title": {"text": x_title}}, "yaxis": {"title": {"text": y_title}, **y_axis}}


def turn(index: int) -> int:
    """Of the index-th dash, symbol or pattern, shifted by one where the colours begin again: 36 pairs differ."""
    return (index + index // len(COLOURS)) % len(COLOURS)


def stroke(index: int, dash: str) -> dict[str, Any]:
    """Of the index-th run's line where the dash says something else: thicker where the colours begin again."""
    return {"color": colour(index), "dash": dash, "width": 2 + 1.5 * (index // len(COLOURS))}


def fill(index: int) -> dict[str, Any]:
    """Of the index-th run's bars: with another pattern where the colours begin again."""
    return {"color": colour(index), "pattern": {"shape": PATTERNS[index // len(COLOURS) % len(PATTERNS)]}}


def dash_lengths(index: int) -> str:
    """Of the index-th run's line, as SVG has them."""
    return _DASH_LENGTHS[turn(index)]


def colour(index: int) -> str:
    """Of the index-th run."""
    return COLOURS[index % len(COLOURS)]
