"""The results in the shape of the paper's Table 1, for the terminal and HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from rich.table import Table as RichTable
from rich.text import Text

from rloop_mcore.algorithm.best_checkpoint import RULE
from rloop_mcore.analysis.curves import checkpoint_label
from rloop_mcore.analysis.pick import ROLES
from rloop_mcore.analysis.read_run import Evaluation, Run, average_keys, conditions_in_words, pass_keys

INTERVALS = "Percent, with 95 % bootstrap intervals over problems in brackets."
_REMOVED = " (removed)"
_ARMS = {"base": "Base", "dapo": "DAPO", "rloop": "RLoop"}


@dataclass(frozen=True, slots=True)
class Row:
    """A policy's line: `metrics` maps "avg@32", "pass@8", ... to {"mean", "low", "high"} in [0, 1].

    `conditions`: see `read_run.conditions_in_words`.
    """

    label: str
    checkpoint: str
    metrics: dict[str, dict[str, float]]
    conditions: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """`rows` are the arms to compare, `others` stand below them. `columns` are metric names."""

    title: str
    note: str
    columns: list[str]
    rows: list[Row]
    others: list[Row]


def results_table(results: dict[str, Any]) -> Table:
    """The table of a `results.json`.

    `results` holds `arms`, {arm: {metric: {"mean", "low", "high"}}} ("base", "dapo", "rloop"), and may hold `others`
    (the same, for rows below the arms), `title` and `note`. An arm may hold `label`, `checkpoint`, `template` and
    `answer_format` (text) too.
    """
    rows = [_row(name, arm) for name, arm in results["arms"].items()]
    others = [_row(name, arm) for name, arm in results.get("others", {}).items()]
    note = results.get("note", f"Each arm is the checkpoint that validation picks: {RULE}.")
    return _table(results.get("title", "Held-out problems"), note, rows, others)


def validation_table(runs: Sequence[Run]) -> Table | None:
    """What validation itself says: base and picked checkpoint of each run, then last theta and last RL policy.

    None where no run has been evaluated. The picked rows are optimistic: the same problems picked them.
    """
    rows, others = [], []
    for run in runs:
        rows += _rows(run, "base", "picked by validation")
        others += _rows(run, "last θ", "last RL policy")
    if not rows:
        return None
    note = f"The picked checkpoint has {RULE}. It was picked on these very problems, so its row is optimistic."
    if any(row.checkpoint.endswith(_REMOVED) for row in [*rows, *others]):
        note += " A removed checkpoint was measured, but its weights were not kept (checkpoint.keep_best)."
    return _table("Validation problems", note, rows, others)


def to_rich(table: Table) -> RichTable:
    """For a terminal."""
    shown = RichTable(title=table.title, caption=table.note, title_justify="left", caption_justify="left")
    shown.add_column("Policy")
    shown.add_column("Checkpoint")
    for column in table.columns:
        shown.add_column(_heading(column), justify="right")
    for rows in (table.rows, table.others):
        for row in rows:
            shown.add_row(Text(row.label), Text(row.checkpoint), *(Text(cell) for cell in _cells(row, table.columns)))
        shown.add_section()
    return shown


def to_html(table: Table) -> str:
    """A `<table>` with a caption; every text is escaped."""
    heads = "".join(f"<th scope='col'>{escape(text)}</th>" for text in ("Policy", "Checkpoint"))
    heads += "".join(f"<th scope='col' class='number'>{escape(_heading(column))}</th>" for column in table.columns)
    bodies = "".join(
        f"<tbody>{''.join(_html_row(row, table.columns) for row in rows)}</tbody>"
        for rows in (table.rows, table.others)
        if rows
    )
    caption = f"<caption><strong>{escape(table.title)}.</strong> {escape(table.note)}</caption>"
    return f"<table class='results'>{caption}<thead><tr>{heads}</tr></thead>{bodies}</table>"


def _table(title: str, note: str, rows: list[Row], others: list[Row]) -> Table:
    """Where the rows were not all measured under the same conditions, each says under which."""
    if len({row.conditions for row in [*rows, *others]}) > 1:
        rows, others = ([_marked(row) for row in group] for group in (rows, others))
        note += " Rows with another prompt template or answer format are not to be compared."
    return Table(title, f"{note} {INTERVALS}", _columns(rows), rows, others)


def _marked(row: Row) -> Row:
    return replace(row, label=f"{row.label} ({row.conditions or 'template not recorded'})")


def _row(name: str, arm: dict[str, Any]) -> Row:
    metrics = {key: value for key, value in arm.items() if "@" in key}
    label = arm.get("label") or _ARMS.get(name, name.replace("_", " "))
    return Row(label, arm.get("checkpoint", ""), metrics, conditions_in_words(arm))


def _rows(run: Run, *roles: str) -> list[Row]:
    return [
        Row(f"{run.name}, {role}", _checkpoint(run, evaluation), evaluation.metrics, evaluation.conditions)
        for role in roles
        if (evaluation := ROLES[role](run.evaluations)) is not None
    ]


def _checkpoint(run: Run, evaluation: Evaluation) -> str:
    return checkpoint_label(evaluation) + (_REMOVED if evaluation.policy in run.removed else "")


def _columns(rows: Iterable[Row]) -> list[str]:
    metrics = {key: None for row in rows for key in row.metrics}
    return [*average_keys(metrics), *pass_keys(metrics)]


def _cells(row: Row, columns: Sequence[str]) -> list[str]:
    return [" ".join(_number(row.metrics.get(column))) for column in columns]


def _number(metric: dict[str, float] | None) -> tuple[str, str]:
    if metric is None:
        return "–", ""
    return f"{100 * metric['mean']:.1f}", f"[{100 * metric['low']:.1f}, {100 * metric['high']:.1f}]"


def _html_row(row: Row, columns: Sequence[str]) -> str:
    cells = f"<th scope='row'>{escape(row.label)}</th><td>{escape(row.checkpoint)}</td>"
    for column in columns:
        mean, interval = _number(row.metrics.get(column))
        cells += f"<td class='number'>{mean} <small>{interval}</small></td>"
    return f"<tr>{cells}</tr>"


def _heading(column: str) -> str:
    return column.capitalize() if column.startswith("avg") else column
