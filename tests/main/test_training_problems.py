"""What is said about golds that nobody can match, and which problems stay."""

import json
import logging
from pathlib import Path

import pytest

from rloop_mcore.compose import load_config
from rloop_mcore.main.training_problems import template_warnings, training_problems
from rloop_mcore.types import Problem


def test_bad_golds_are_left_out_of_training_and_stay_in_the_validation_set(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = tmp_path / "train.jsonl"
    golds = {"good": "1", "bad": "\\frac{5055}{2^{15}"}
    train.write_text("".join(json.dumps({"id": n, "problem": f"{n}?", "answer": a}) + "\n" for n, a in golds.items()))
    config = load_config(["run.dir=r", "model.path=m", f"data.train={train}", "reward.workers=1"])
    validation = [Problem("v1", "one", "2"), Problem("v2", "other", "\\mathbb{Z}_8")]
    for start in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            problems = training_problems(config, validation, tmp_path / "golds.json")
        assert [problem.id for problem in problems] == ["good"], start
        assert [problem.id for problem in validation] == ["v1", "v2"]
        assert "1 of 2 gold answers of data.validation don't verify against themselves" in caplog.text
        assert "v2 (unparsable)" in caplog.text
        assert "1 of 2 gold answers don't verify against themselves and are left out: bad (unparsable)" in caplog.text


def test_a_problem_with_two_answers_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = tmp_path / "train.jsonl"
    train.write_text("".join(json.dumps({"problem": "Why?", "answer": answer}) + "\n" for answer in ("42", "43")))
    config = load_config(["run.dir=r", "model.path=m", f"data.train={train}", "reward.workers=1"])
    with caplog.at_level(logging.WARNING):
        problems = training_problems(config, [], tmp_path / "golds.json")
    assert [problem.answer for problem in problems] == ["42", "43"]
    assert "1 of 2 training problems have the text of an earlier one and another answer" in caplog.text
    assert f"{problems[1].id} (answer 43, which is 42 in {problems[0].id})" in caplog.text


def test_a_template_that_asks_for_another_answer_format_is_a_warning() -> None:
    """DAPO's prompt with the default format: no response was ever right, and nothing said why."""
    given = ["run.dir=r", "model.path=m", "data.train=t.jsonl", "data.template=dapo"]
    assert template_warnings(load_config(given)) == [
        "data.template=dapo asks for reward.answer_format=answer_line; answers are looked for as boxed."
    ]
    assert template_warnings(load_config([*given, "reward.answer_format=answer_line"])) == []
    assert template_warnings(load_config([*given, "reward.verifier=mine:right"])) == []
