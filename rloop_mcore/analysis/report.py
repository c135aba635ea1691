"""One self-contained HTML file about one or more runs: it opens without a network, a server or this package."""

from __future__ import annotations

import base64
import gzip
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from rloop_mcore.analysis import curves
from rloop_mcore.analysis.browser import Words, browser
from rloop_mcore.analysis.compare import differences
from rloop_mcore.analysis.events import environments, events
from rloop_mcore.analysis.figures import sections, validation_metrics
from rloop_mcore.analysis.maths import Formulas
from rloop_mcore.analysis.pick import pick
from rloop_mcore.analysis.plots import colour, dash_lengths
from rloop_mcore.analysis.read_run import Run, read_run
from rloop_mcore.analysis.table import results_table, to_html, validation_table
from rloop_mcore.analysis.thin import thin
from rloop_mcore.errors import UserError
from rloop_mcore.platform.files import write_atomic

CHARACTERS = 10_000_000  # of responses in a page, over all runs: some 4 MB of it
FORMULAS = 20_000  # that are drawn; the others stay LaTeX
_PAGE = Environment(
    loader=PackageLoader("rloop_mcore.analysis", "page"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def write_report(
    run_dirs: Sequence[Path],
    out: Path,
    table: dict[str, Any] | None = None,
    words: Sequence[Words] = (),
) -> None:
    """Write the report of `run_dirs` to `out`.

    `table` holds the final results, see `table.results_table`; without it only what validation says is shown. `words`
    are the runs' tokenizers, in their order; without them responses of the cache are shown as token ids.
    Raises UserError where a directory is not a run's.
    """
    page = render(read_runs(run_dirs), table, words)
    # paths in it may hold bytes that were no text in the locale, and as UTF-8 mostly are one
    write_atomic(out, page.encode(errors="surrogateescape").decode(errors="replace"))


def read_runs(run_dirs: Sequence[Path]) -> list[Run]:
    """The runs; those of equal names get as many of their parent folders in front as tell them apart.

    Raises UserError for what is no run, and for a run that is given twice.
    """
    runs = [read_run(path) for path in run_dirs]
    while repeated := {name for name, count in Counter(run.name for run in runs).items() if count > 1}:
        longer = [replace(run, name=_longer(run)) if run.name in repeated else run for run in runs]
        if longer == runs:
            raise UserError(f"/{min(repeated)} is given twice: name each run once.")
        runs = longer
    return runs


def _longer(run: Run) -> str:
    """Its name with one more parent folder."""
    parts = run.path.resolve().parts[1:]
    return "/".join(parts[-2 - run.name.count("/") :])


def render(
    runs: Sequence[Run], table: dict[str, Any] | None = None, words: Sequence[Words] = (), live: bool = False
) -> str:
    """The page. With `live` it asks its server for news, and for plotly.js."""
    drawn = [replace(section, figures=[thin(figure) for figure in section.figures]) for section in sections(runs)]
    tables = [results_table(table)] if table else []
    tables += [validation] if (validation := validation_table(runs)) else []
    specs = [figure.spec for section in drawn for figure in section.figures]
    scripts = ["figures.js", "browser.js", *(["live.js"] if live else [])]
    return _PAGE.get_template("report.html.jinja").render(
        heading="RLoop report" if len(runs) == 1 else f"RLoop report: {len(runs)} runs",
        title=" · ".join(run.name for run in runs),
        style=_source("style.css"),
        overview=[_overview(run, index) for index, run in enumerate(runs)],
        tables=[Markup(to_html(each)) for each in tables],
        sections=drawn,
        specs=Markup(json.dumps(specs, allow_nan=False).replace("<", "\\u003c")),
        held=_held(runs, words),
        events=_events(runs),
        differences=differences(runs),
        environments=[environments(run) for run in runs],
        runs=runs,
        written=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        live=live,
        plotly=Markup(get_plotlyjs()) if not live else "",
        scripts=[_source(name) for name in scripts],
    )


def _source(name: str) -> Markup:
    loader = _PAGE.loader
    assert loader is not None
    return Markup(loader.get_source(_PAGE, name)[0])


def _held(runs: Sequence[Run], words: Sequence[Words]) -> str:
    """The trajectory browser's content: JSON, gzipped, in base64."""
    formulas, each = Formulas(FORMULAS), CHARACTERS // len(runs)
    spoken = [*words, *[Words()] * (len(runs) - len(words))]
    found = [browser(run, theirs, formulas, each) for run, theirs in zip(runs, spoken, strict=True)]
    content = json.dumps({"runs": found, "formulas": formulas.table}, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(content.encode(), mtime=0)).decode()


def _overview(run: Run, index: int) -> dict[str, Any]:
    """What changed from the first to the last measurement of a run."""
    metrics = validation_metrics([run])[:2]
    shares = curves.fine_tuning_share(run)
    picked = pick(run.evaluations)
    facts = {
        "RL steps": _rl_steps(run),
        "Training success": _change(curves.training(run, "success_rate").y),
        **{f"Validation {metric}": _change(curves.validation(run, metric).y) for metric in metrics},
        "Picked checkpoint": curves.checkpoint_label(picked) if picked else "–",
        "RFT's share of tokens": f"{shares['tokens']:.1%}" if "tokens" in shares else "–",
        "RFT's share of time": f"{shares['seconds']:.1%}" if "seconds" in shares else "–",
    }
    return {"Run": run.name, "colour": colour(index), "dashes": dash_lengths(index), "facts": facts}


def _rl_steps(run: Run) -> str:
    ended = [str(iteration + 1) for iteration in curves.ended_early(run)]
    return f"{curves.rl_steps(run)}" + (f", iteration {', '.join(ended)} ended early by the guard" if ended else "")


def _change(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{known[0]:.1%} → {known[-1]:.1%}" if known else "–"


def _events(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Of all runs, by time."""
    found = sorted(((event, run.name) for run in runs for event in events(run)), key=lambda each: each[0].time)
    return [
        {
            "time": f"{datetime.fromtimestamp(event.time, UTC):%Y-%m-%d %H:%M:%S}",
            "run": name,
            "kind": event.kind,
            "text": event.text,
        }
        for event, name in found
    ]
