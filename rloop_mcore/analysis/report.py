"""One self-contained HTML file about one or more runs: it opens without a network, a server or this package."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from rloop_mcore.analysis import curves
from rloop_mcore.analysis.figures import sections, validation_metrics
from rloop_mcore.analysis.pick import pick
from rloop_mcore.analysis.read_run import Run, read_run
from rloop_mcore.analysis.table import results_table, to_html, validation_table
from rloop_mcore.platform.files import write_atomic


def write_report(run_dirs: Sequence[Path], out: Path, table: dict[str, Any] | None = None) -> None:
    """Write the report of `run_dirs` to `out`.

    `table` holds the final results, see `table.results_table`; without it only what validation says is shown.
    Raises UserError where a directory is not a run's.
    """
    runs = _named_apart([read_run(path) for path in run_dirs])
    drawn = sections(runs)
    validation = validation_table(runs)
    tables = [results_table(table)] if table else []
    tables += [validation] if validation else []
    page = Environment(
        loader=PackageLoader("rloop_mcore.analysis", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.jinja")
    specs = [figure.spec for section in drawn for figure in section.figures]
    html = page.render(
        title=" · ".join(run.name for run in runs),
        overview=[_overview(run, validation_metrics(runs)[:2]) for run in runs],
        tables=[Markup(to_html(each)) for each in tables],
        sections=drawn,
        specs=Markup(json.dumps(specs, allow_nan=False).replace("<", "\\u003c")),
        runs=runs,
        plotly=Markup(get_plotlyjs()),
    )
    write_atomic(out, html)


def _named_apart(runs: Sequence[Run]) -> list[Run]:
    """Runs of equal names get their parent folder's name in front."""
    count = Counter(run.name for run in runs)
    return [
        replace(run, name=f"{run.path.resolve().parent.name}/{run.name}") if count[run.name] > 1 else run
        for run in runs
    ]


def _overview(run: Run, metrics: Sequence[str]) -> dict[str, str]:
    """What changed from the first to the last measurement of a run, heading by heading."""
    shares = curves.fine_tuning_share(run)
    picked = pick(run.evaluations)
    return {
        "Run": run.name,
        "RL steps": _rl_steps(run),
        "Training success": _change(curves.training(run, "success_rate").y),
        **{f"Validation {metric}": _change(curves.validation(run, metric).y) for metric in metrics},
        "Picked checkpoint": curves.checkpoint_label(picked) if picked else "–",
        "RFT's share of tokens": f"{shares['tokens']:.1%}" if "tokens" in shares else "–",
        "RFT's share of time": f"{shares['seconds']:.1%}" if "seconds" in shares else "–",
    }


def _rl_steps(run: Run) -> str:
    ended = [str(iteration + 1) for iteration in curves.ended_early(run)]
    return f"{curves.rl_steps(run)}" + (f", iteration {', '.join(ended)} ended early by the guard" if ended else "")


def _change(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{known[0]:.1%} → {known[-1]:.1%}" if known else "–"
