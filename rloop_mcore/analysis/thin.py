"""Fewer points of a long curve, for the page: drawn curves look the same, and the caption says so."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rloop_mcore.analysis.plots import Figure

POINTS = 1200  # of a curve


def thin(figure: Figure) -> Figure:
    """Of each line with more than POINTS points, the lowest and the highest of every so many neighbours."""
    longest = max((len(trace["x"]) for trace in figure.spec["data"] if trace["type"] == "scatter"), default=0)
    if longest <= POINTS:
        return figure
    data = [_thinned(trace) if trace["type"] == "scatter" else trace for trace in figure.spec["data"]]
    every = -(-longest // (POINTS // 2))
    note = f" Drawn: the lowest and the highest of every {every} of {longest} points."
    return replace(figure, caption=figure.caption + note, spec={**figure.spec, "data": data})


def _thinned(trace: dict[str, Any]) -> dict[str, Any]:
    count = len(trace["x"])
    if count <= POINTS or "text" in trace:  # checkpoints are never left out
        return trace
    every, kept = -(-count // (POINTS // 2)), []
    for start in range(0, count, every):
        places = [i for i in range(start, min(start + every, count)) if trace["y"][i] is not None]
        if places:
            kept += sorted({min(places, key=lambda i: trace["y"][i]), max(places, key=lambda i: trace["y"][i])})
    return {**trace, "x": [trace["x"][i] for i in kept], "y": [trace["y"][i] for i in kept]}
