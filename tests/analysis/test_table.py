"""One table, three renderings."""

import json
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

from rich.console import Console

from rloop_mcore.analysis.read_run import read_run
from rloop_mcore.analysis.table import results_table, to_html, to_rich, validation_table

RESULTS = {
    "arms": {
        "base": {
            "avg@32": {"mean": 0.168, "low": 0.15, "high": 0.19},
            "pass@8": {"mean": 0.4, "low": 0.3, "high": 0.5},
        },
        "rloop": {
            "avg@32": {"mean": 0.3435, "low": 0.301, "high": 0.38},
            "pass@8": {"mean": 1.0, "low": 1.0, "high": 1.0},
            "checkpoint": "RL | <b>2</b>",
        },
    },
    "others": {"rloop_last_theta": {"avg@32": {"mean": 0.25, "low": 0.2, "high": 0.3}, "label": "RLoop, last θ"}},
}


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def test_html_and_what_it_escapes() -> None:
    cells = Cells()
    cells.feed(to_html(results_table(RESULTS)))
    assert cells.rows == [
        ["Policy", "Checkpoint", "Avg@32", "pass@8"],
        ["Base", "", "16.8 [15.0, 19.0]", "40.0 [30.0, 50.0]"],
        ["RLoop", "RL | <b>2</b>", "34.4 [30.1, 38.0]", "100.0 [100.0, 100.0]"],
        ["RLoop, last θ", "", "25.0 [20.0, 30.0]", "– "],
    ]
    assert "b" not in cells.tags


def test_terminal() -> None:
    console = Console(width=160, record=True, file=StringIO())
    console.print(to_rich(results_table(RESULTS)))
    text = console.export_text()
    assert "34.4 [30.1, 38.0]" in text
    assert "bootstrap" in text


def test_validation_rows_are_base_picked_and_last(rloop_run: Path, dapo_run: Path) -> None:
    table = validation_table([read_run(rloop_run), read_run(dapo_run)])
    assert table is not None
    assert table.columns == ["avg@32", "pass@8", "pass@16", "pass@32"]
    assert [(row.label, row.checkpoint) for row in table.rows] == [
        ("rloop, base", "θ0"),
        ("rloop, picked by validation", "RL, iteration 2, step 4"),
        ("dapo, base", "θ0"),
        ("dapo, picked by validation", "RL, iteration 1, step 4"),
    ]
    assert [(row.label, row.checkpoint) for row in table.others] == [
        ("rloop, last θ", "θ2"),
        ("rloop, last RL policy", "RL, iteration 2, step 4"),
        ("dapo, last RL policy", "RL, iteration 1, step 8"),
    ]


def test_a_checkpoint_whose_weights_are_gone_says_so(dapo_run: Path) -> None:
    assert "not kept" not in to_html(validation_table([read_run(dapo_run)]))  # type: ignore[arg-type]
    with (dapo_run / "journal.jsonl").open("a") as journal:
        journal.write(json.dumps({"event": "removed", "paths": ["policies/i0_explore_000008"]}) + "\n")
    table = validation_table([read_run(dapo_run)])
    assert table is not None
    assert [row.checkpoint for row in table.rows] == ["θ0", "RL, iteration 1, step 4"]
    assert [row.checkpoint for row in table.others] == ["RL, iteration 1, step 8 (removed)"]
    assert "its weights were not kept (checkpoint.keep_best)" in table.note


def test_no_evaluation_no_table(make_run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert validation_table([read_run(make_run(tmp_path / "run", {}))]) is None


def test_rows_of_different_templates_say_so(rloop_run: Path, dapo_run: Path) -> None:
    for run, template in ((rloop_run, "r1_zero"), (dapo_run, "r1_zero")):
        for path in (run / "evaluation").glob("*.json"):
            path.write_text(
                json.dumps({**json.loads(path.read_text()), "template": template, "answer_format": "boxed"})
            )
    alike = validation_table([read_run(rloop_run), read_run(dapo_run)])
    assert alike is not None
    assert "template" not in to_html(alike)
    base = dapo_run / "evaluation" / "base.json"
    base.write_text(base.read_text().replace("r1_zero", "qwen25_math_cot"))
    table = validation_table([read_run(rloop_run), read_run(dapo_run)])
    assert table is not None
    assert [row.label for row in table.rows] == [
        "rloop, base (r1_zero, boxed)",
        "rloop, picked by validation (r1_zero, boxed)",
        "dapo, base (qwen25_math_cot, boxed)",
        "dapo, picked by validation (r1_zero, boxed)",
    ]
    assert "not to be compared" in to_html(table)


def test_an_arm_of_an_unknown_template_is_marked_beside_a_known_one() -> None:
    arms = {**RESULTS["arms"], "dapo": {**RESULTS["arms"]["base"], "template": "dapo", "answer_format": "answer_line"}}
    labels = [row.label for row in results_table({"arms": arms}).rows]
    assert labels == ["Base (template not recorded)", "RLoop (template not recorded)", "DAPO (dapo, answer_line)"]
