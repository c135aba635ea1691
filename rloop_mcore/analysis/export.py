"""A report's figures as files: the numbers behind each as CSV, and the drawing as PNG and SVG."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from html import escape, unescape
from importlib.util import find_spec
from itertools import chain, count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rloop_mcore.analysis.figures import sections
from rloop_mcore.analysis.plots import Figure
from rloop_mcore.analysis.read_run import Run
from rloop_mcore.errors import Fault
from rloop_mcore.platform.files import atomic_path, write_atomic

FORMATS = ("svg", "png")
_SIZE = {"width": 760, "height": 480}
_LONGEST_NAME = 100  # of a file; a source of the problems may be called anything


def export(runs: Sequence[Run], folder: Path) -> tuple[int, str]:
    """Write NAME.csv, NAME.svg and NAME.png of every figure into `folder`; files of these names are replaced.

    Returns the number of figures, and why there are no drawings where there are none: Kaleido draws them with a Chrome
    or Chromium, and is the extra `export`. Raises Fault where it is there and fails.
    """
    figures = [figure for section in sections(runs) for figure in section.figures]
    for name, figure in zip(_file_names(figures), figures, strict=True):
        write_atomic(folder / f"{name}.csv", to_csv(figure))
    return len(figures), draw(figures, folder, FORMATS)


def _file_names(figures: Sequence[Figure]) -> list[str]:
    """Of their titles: lower case, words joined by underscores, with a number where that is another's already."""
    names: list[str] = []
    for figure in figures:
        title = re.sub(r"[^\w@]+", "_", figure.title.lower()).strip("_")[:_LONGEST_NAME]
        names.append(next(name for name in chain([title], (f"{title}_{n}" for n in count(2))) if name not in names))
    return names


def to_csv(figure: Figure) -> str:
    """trace, x, y with low and high of an interval and the point's label; or i, j, value of a matrix."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    data = figure.spec["data"]
    writer.writerow(["i", "j", "value"] if data and data[0]["type"] == "heatmap" else _COLUMNS)
    for trace in data:
        writer.writerows(_matrix_rows(trace) if trace["type"] == "heatmap" else _rows(trace))
    return out.getvalue()


_COLUMNS = ["trace", "x", "y", "low", "high", "label"]


def _rows(trace: dict[str, Any]) -> Iterator[list[Any]]:
    bars, labels = trace.get("error_y"), trace.get("text", [])
    for place, (x, y) in enumerate(zip(trace["x"], trace["y"], strict=True)):
        if y is None:
            continue
        low = y - bars["arrayminus"][place] if bars else None
        high = y + bars["array"][place] if bars else None
        yield [unescape(trace["name"]), x, y, low, high, labels[place] if labels else None]


def _matrix_rows(trace: dict[str, Any]) -> Iterator[list[Any]]:
    for i, row in zip(trace["y"], trace["z"], strict=True):
        yield from ([i, j, value] for j, value in zip(trace["x"], row, strict=True) if value is not None)


def draw(figures: Sequence[Figure], folder: Path, formats: Sequence[str]) -> str:
    """Write NAME.svg or NAME.png, as `formats` say, of every figure; "", or why there are none (see `export`)."""
    if find_spec("kaleido") is None:
        return "no PNG and SVG: Kaleido is not installed (pip install 'rloop-mcore[export]')"
    import kaleido
    from choreographer.browsers.chromium import ChromeNotFoundError

    named = list(zip(_file_names(figures), figures, strict=True))
    wanted = [(figure, f"{name}.{kind}", kind) for name, figure in named for kind in formats]
    with TemporaryDirectory(dir=folder, prefix=".tmp-") as drawn:
        jobs: list[dict[str, Any]] = [
            {"fig": _on_paper(figure), "path": f"{drawn}/{name}", "opts": {**_SIZE, "format": kind}}
            for figure, name, kind in wanted
        ]
        try:
            # without MathJax, which it would fetch from a network
            failed = kaleido.write_fig_from_object_sync(jobs, kopts={"mathjax": False})
        except ChromeNotFoundError:
            return "no PNG and SVG: Kaleido finds no Chrome or Chromium (BROWSER_PATH names one)"
        if failed:
            raise Fault(f"Kaleido could not draw {len(failed)} figures; the first: {failed[0]}")
        for _, name, _ in wanted:
            with atomic_path(folder / name) as temporary:
                Path(drawn, name).replace(temporary)
    return ""


def _on_paper(figure: Figure) -> dict[str, Any]:
    """The figure on white, with its title."""
    layout = figure.spec["layout"]
    axis = {"gridcolor": "#dde2e9", "zerolinecolor": "#dde2e9", "linecolor": "#566172", "automargin": True}
    return {
        "data": figure.spec["data"],
        "layout": {
            "template": {},
            "title": {"text": escape(figure.title), "x": 0.02, "xanchor": "left"},
            "paper_bgcolor": "white",
            "plot_bgcolor": "white",
            "font": {"color": "#1c2430", "family": "DejaVu Sans, Arial, sans-serif", "size": 13},
            "showlegend": len(figure.spec["data"]) > 1,
            **layout,
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", **layout.get("legend", {})},
            "xaxis": axis | layout["xaxis"],
            "yaxis": axis | layout["yaxis"],
        },
    }
