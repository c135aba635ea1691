"""`rloop compare`: what two runs differ in, what came of it, and whether that is more than chance."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rloop_mcore.analysis.answers import Answers, read_answers
from rloop_mcore.analysis.compare import block_forgetting, clashing_ids, differences
from rloop_mcore.analysis.pick import ROLES
from rloop_mcore.analysis.read_run import Evaluation, Run, pass_keys
from rloop_mcore.analysis.report import read_runs, write_report
from rloop_mcore.analysis.table import to_rich, validation_table
from rloop_mcore.errors import UserError
from rloop_mcore.evaluation.paired import compare_paired
from rloop_mcore.evaluation.pass_at_k import average, pass_at_k
from rloop_mcore.main.report import words_of
from rloop_mcore.main.run_directory import output_in
from rloop_mcore.platform.files import write_atomic

_BLOCKS = {"intra": "of the problems within an iteration", "inter": "between iterations"}
_SEED = 0  # of the bootstrap: the same every time


def compare(first: Path, second: Path, out: Path | None, json_out: Path | None) -> int:
    """Print the comparison and write the report of both. Raises UserError."""
    target = out or output_in(first, "compare.html")
    runs = read_runs([first, second])
    if different := clashing_ids(*runs):
        raise UserError(
            f"{first} and {second} were evaluated on different problems under the same ids ({len(different)} of them, "
            f"{different[0]!r} for one): they cannot be compared problem by problem."
        )
    paired = {role: found for role in ROLES if (found := _paired(runs, role))}
    if not paired:
        raise UserError(f"{first} and {second} have no evaluations of the same problems: there is nothing to compare.")
    result: dict[str, Any] = {
        "runs": [str(run.path) for run in runs],
        "config": differences(runs),
        "paired": paired,
        "forgetting": block_forgetting(runs),
    }
    write_report([first, second], target, words=[words_of(first), words_of(second)])
    if json_out is not None:
        write_atomic(json_out, json.dumps(result, indent=1) + "\n")
    _print(runs, result)  # after the files: who reads it may see enough before the end
    print(f"report: {target}")
    return 0


def _paired(runs: list[Run], role: str) -> dict[str, dict[str, float]]:
    """Per metric the mean difference second - first over the problems that both answered, its interval and p-value.

    The metric is "avg" and not "avg@N" where the numbers of samples differ: each side is the mean of all it has.
    """
    evaluations = [ROLES[role](run.evaluations) for run in runs]
    answers = [_answers(run, evaluation) for run, evaluation in zip(runs, evaluations, strict=True)]
    if answers[0] is None or answers[1] is None:
        return {}
    problems = sorted(set(answers[0].problems) & set(answers[1].problems))
    if not problems:
        return {}
    counts = [_counts(each, problems) for each in answers if each is not None]
    numbers = {int(number) for _, asked in counts for number in asked}  # of samples, of the problems of both
    known = {key for each in evaluations if each is not None for key in each.metrics}
    ks = [k for key in pass_keys(dict.fromkeys(known)) if (k := int(key.removeprefix("pass@"))) <= min(numbers)]
    values = {f"avg@{min(numbers)}" if len(numbers) == 1 else "avg": [average(*each) for each in counts]}
    values |= {f"pass@{k}": [pass_at_k(*each, k) for each in counts] for k in ks}
    found = {name: compare_paired(b, a, _SEED) for name, (a, b) in values.items()}
    return {
        name: {**asdict(each.interval), "p_value": each.p_value, "problems": each.problems}
        for name, each in found.items()
    }


def _answers(run: Run, evaluation: Evaluation | None) -> Answers | None:
    if evaluation is None:
        return None
    path = run.samples_file(evaluation)
    return read_answers(path) if path.exists() else None


def _counts(answers: Answers, problems: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Successes and samples [problems]."""
    rows = [answers.rows_of(problem) for problem in problems]
    return np.array([int(answers.correct[mine].sum()) for mine in rows]), np.array([len(mine) for mine in rows])


def _print(runs: list[Run], result: dict[str, Any]) -> None:
    console = Console()
    names = [run.name for run in runs]
    if result["config"]:
        table = Table(title="What differs", title_justify="left")
        for heading in ("key", *names):
            table.add_column(Text(heading))
        for key, values in result["config"].items():
            table.add_row(*map(Text, (key, *values)))
        console.print(table)
    if (validation := validation_table(runs)) is not None:
        console.print(to_rich(validation))
    table = Table(title=Text(f"{names[1]} − {names[0]}, problem by problem, points"), title_justify="left")
    table.caption = "95 % bootstrap intervals over problems; p: two-sided sign-flip permutation test."
    table.add_column("policies")
    columns = list(dict.fromkeys(name for found in result["paired"].values() for name in found))
    if "avg" in columns:
        table.caption += " avg: of all samples, of which there are different numbers."
    for name in columns:
        table.add_column(name, justify="right")
    for role, found in result["paired"].items():
        table.add_row(role, *(Text(_difference(found.get(name))) for name in columns))
    console.print(table)
    for row in result["forgetting"]:
        parts = [f"{100 * row[key]:.1f} % {words}" for key, words in _BLOCKS.items() if row[key] is not None]
        console.print(f"{row['run']} forgets {', '.join(parts)}", highlight=False, markup=False, soft_wrap=True)


def _difference(found: dict[str, float] | None) -> str:
    if found is None:
        return "–"
    interval = f"[{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"
    return f"{100 * found['mean']:+.1f} {interval} p={found['p_value']:.2g}"
