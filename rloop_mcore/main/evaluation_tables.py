"""What `rloop evaluate` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

Record = dict[str, Any]

_LOG_WIDTH = 160
_PERCENT = "Percent, with 95 % bootstrap intervals over problems."
_ROWS = {
    "response_length": ("tokens a response", "{:.1f}"),
    "truncated": ("cut at the limit", "{:.1%}"),
    "problems": ("problems", "{}"),
    "too_long": ("left out as too long", "{}"),
    "bad_golds": ("with a gold that fails", "{}"),
}


def print_results(records: Sequence[Record], together: Mapping[str, Mapping[str, float]]) -> None:
    """A column a benchmark, and their mean where there are several; then groups of problems, then the conditions."""
    console = _console()
    table = Table(title=Text(records[0]["policy"]), title_justify="left", caption=_PERCENT, caption_justify="left")
    table.add_column("metric")
    for record in records:
        table.add_column(Text(record["name"]), justify="right")
    if len(records) > 1:
        table.add_column("mean", justify="right")
    for key in together:
        cells = [_interval(record["metrics"][key]) for record in records]
        table.add_row(key, *cells, *([_interval(together[key])] if len(records) > 1 else []))
    for key, (title, words) in _ROWS.items():
        table.add_row(title, *(words.format(record[key]) for record in records))
    console.print(table)
    for record in records:
        for kind, groups in record["groups"].items():
            console.print(_groups(record, kind, groups))
    sampling = records[0]["sampling"]
    console.print(
        f"{sampling['samples']} responses a problem, temperature {sampling['temperature']}, top-p {sampling['top_p']}, "
        f"at most {sampling['max_tokens']} tokens; template {records[0]['template']}, answers "
        f"{records[0]['answer_format']}, verifier {records[0]['verifier']}",
    )
    for record in records:
        console.print(f"samples: {record['samples']}", soft_wrap=True)


def print_comparison(against: Record) -> None:
    """A table a benchmark: the difference, its interval, its p-value; below it, what else differs."""
    console = _console()
    for name, found in against["benchmarks"].items():
        table = Table(
            title=Text(f"{name}: {found['policy']} minus {found['other']}"),
            title_justify="left",
            caption=f"Percentage points over {found['problems']} problems, with 95 % paired bootstrap intervals; "
            "p of the two-sided sign-flip permutation test.",
            caption_justify="left",
        )
        for heading in ("metric", "difference", "95 % interval", "p"):
            table.add_column(heading, justify="left" if heading == "metric" else "right")
        for key, value in found["metrics"].items():
            interval = f"{100 * value['low']:+.2f} to {100 * value['high']:+.2f}"
            table.add_row(key, f"{100 * value['mean']:+.2f}", interval, f"{value['p_value']:.4f}")
        console.print(table)
        if found["problems"] < max(found["problems_each"]):
            mine, theirs = found["problems_each"]
            console.print(f"only the problems in both count: {found['problems']} of {mine} and {theirs}")
        for key, (mine, theirs) in found["differing"].items():
            console.print(f"warning: {key} differs: {mine} here, {theirs} there", soft_wrap=True)


def _console() -> Console:
    """In a log as wide as four benchmarks need."""
    width = None if Console().is_terminal else _LOG_WIDTH
    return Console(width=width, highlight=False, markup=False)  # names may be anybody's, brackets included


def _groups(record: Record, kind: str, groups: Mapping[str, Record]) -> Table:
    table = Table(title=Text(f"{record['name']} by {kind}"), title_justify="left")
    metrics = [key for key in record["metrics"] if not key.startswith("maj@")]
    for heading in (kind, "problems", *metrics, "tokens", "cut"):
        table.add_column(heading, justify="left" if heading == kind else "right")
    for value, group in groups.items():
        cells = [f"{100 * group['metrics'][key]['mean']:.1f}" for key in metrics]
        table.add_row(
            Text(value), str(group["problems"]), *cells, f"{group['response_length']:.0f}", f"{group['truncated']:.0%}"
        )
    return table


def _interval(value: Mapping[str, float]) -> str:
    return f"{100 * value['mean']:.2f} [{100 * value['low']:.2f}, {100 * value['high']:.2f}]"
