"""`rloop grade`'s function: rows in, the same rows with verdicts out."""

import json
from pathlib import Path

import pytest

from rloop_mcore.config import RewardConfig
from rloop_mcore.errors import UserError
from rloop_mcore.reward.grade import grade_file

OUTPUTS = Path(__file__).parents[3] / "shared" / "data" / "grading_outputs.jsonl"


def test_rows_keep_their_fields_and_order(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "gold": r"\frac{1}{2}", "pred": r"so \boxed{0.5}", "source": "kept"},
        {"id": 2, "gold": "1", "pred": r"\boxed{2}"},
        {"id": "c", "gold": "1", "pred": "1 \u2028"},
        {"id": "d", "gold": "2 + 3 = <<2+3=5>>5\n#### 5", "pred": r"\boxed{5}"},
    ]
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    summary = grade_file(path, out, RewardConfig(workers=1))
    graded = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(row["correct"], row["reason"]) for row in graded] == [
        (True, "correct"),
        (False, "wrong"),
        (False, "no_answer"),
        (True, "correct"),
    ]
    assert all(row["seconds"] >= 0 for row in graded)
    assert [{key: row[key] for key in original} for row, original in zip(graded, rows, strict=True)] == rows
    assert summary == {
        "rows": 4,
        "correct": 2,
        "accuracy": 1 / 2,
        "answer_format": "boxed",
        "reasons": {"correct": 2, "no_answer": 1, "wrong": 1},
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ("[1]", "line 2: not a JSON object"),
        ('{"id": "b", "pred": ""}', "line 2: no field 'gold'"),
        ('{"id": "b", "gold": 1, "pred": ""}', "line 2: 'gold' must be a string and is 1"),
        ('{"id": "b", "gold": "1", "pred": null}', "line 2: 'pred' must be a string and is null"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"id": "a", "gold": "1", "pred": "1"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        grade_file(path, None, RewardConfig())


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.jsonl: cannot be read"):
        grade_file(tmp_path / "absent.jsonl", None, RewardConfig())


@pytest.mark.skipif(not OUTPUTS.exists(), reason="needs ../shared/data/grading_outputs.jsonl")
def test_real_outputs_agree_with_their_labels(tmp_path: Path) -> None:
    """Half of the rows carry no box: no answer in this format. Of the others, only two golds are disputed.

    Their labels come from a string comparison that takes "4:30 p.m." in another text command, or 10000 without the
    separator, for another answer.
    """
    out = tmp_path / "out.jsonl"
    grade_file(OUTPUTS, out, RewardConfig(workers=1))
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    boxed = [row for row in rows if "\\boxed" in row["pred"]]
    assert all(row["reason"] == "no_answer" for row in rows if "\\boxed" not in row["pred"])
    assert len(boxed) == 144
    disputed = [(row["gold"], row["correct"]) for row in boxed if row["correct"] != row["expected"]]
    assert set(disputed) == {(r"\text{4:30 p.m.}", True), (r"10{,}000", True)}
    assert len(disputed) == 9
