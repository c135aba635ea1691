"""`rloop report`: one HTML file about one or more runs, and its figures as files."""

from __future__ import annotations

import argparse
from pathlib import Path

from rloop_mcore.analysis.browser import Words
from rloop_mcore.analysis.export import export
from rloop_mcore.analysis.report import read_runs, write_report
from rloop_mcore.data.problems import HF_PREFIX, load_problems
from rloop_mcore.data.tokenizer import TextTokenizer
from rloop_mcore.errors import UserError
from rloop_mcore.main.run_directory import RunDirectory, output_in


def report(options: argparse.Namespace) -> int:
    """Write what the options ask for, and say where it is. Raises UserError for a folder that is no run."""
    if options.live and (options.out or options.export):
        raise UserError("--live serves the page and writes no file: leave out --out and --export, or --live.")
    if options.port and not options.live:
        raise UserError(f"--port {options.port} is of --live: add that, or leave it out.")
    if options.live:
        from rloop_mcore.main.live import serve_live

        return serve_live(options.runs, options.port)
    target = options.out or output_in(options.runs[0], "report.html")
    write_report(options.runs, target, words=[words_of(run) for run in options.runs])
    print(f"report: {target}")
    if options.export is not None:
        count, missing = export(read_runs(options.runs), options.export)
        print(f"{options.export}: {count} figures as CSV" + (f"; {missing}" if missing else ", SVG and PNG"))
    return 0


def words_of(path: Path) -> Words:
    """The run's tokenizer and its validation problems, as far as they are at hand: a report does without them."""
    run = RunDirectory(path)
    try:
        config = run.read_config()
    except UserError:
        return Words()
    statements = {}
    source = config.data.validation
    if source is not None and not source.startswith(HF_PREFIX):  # a report asks nothing of a network
        try:
            statements = {each.id: each.problem for each in load_problems(source, config.evaluation.limit)}
        except UserError:
            statements = {}
    for folder in (run.model(config), *sorted((path / "policies").glob("*"))):
        try:
            return Words(TextTokenizer(folder).decode, statements)
        except UserError:
            continue
    return Words(None, statements)
