"""Comparing two results, problem by problem."""

import json
from pathlib import Path
from typing import Any

import pytest

from rloop_mcore.data.countdown_model import write_model
from rloop_mcore.errors import UserError
from rloop_mcore.evaluation.paired import compare_paired
from rloop_mcore.main import evaluate as evaluation
from rloop_mcore.main.against import compare, read_result
from rloop_mcore.main.arguments import parse


def record(scores: dict[str, float], **changes: Any) -> dict[str, Any]:
    return {
        "name": "aime24",
        "policy": "p",
        "scores": {"avg@8": scores},
        "counts": {id: [0, 8] for id in scores},
        "sampling": {"max_tokens": 10, "temperature": 1.0, "top_p": 0.7, "samples": 8},
        "template": "r1_zero",
        **changes,
    }


def test_problems_are_paired_by_id() -> None:
    mine, theirs = record({"a": 0.5, "b": 1.0, "c": 0.25}), record({"c": 0.5, "a": 0.25, "d": 1.0}, policy="q")
    found = compare([mine], {"aime24": theirs}, seed=3)["aime24"]
    expected = compare_paired([0.5, 0.25], [0.25, 0.5], seed=3)
    assert found["metrics"]["avg@8"]["mean"] == expected.interval.mean
    assert found["metrics"]["avg@8"]["p_value"] == expected.p_value
    assert (found["problems"], found["problems_each"]) == (2, [3, 3])
    assert found["differing"] == {}


def test_what_differs_beside_the_policies_is_said() -> None:
    other = record({"a": 0.5}, template="qwen25_math_cot")
    other["sampling"]["temperature"] = 0.6
    found = compare([record({"a": 0.5})], {"aime24": other}, seed=0)["aime24"]
    assert found["differing"] == {"template": ["r1_zero", "qwen25_math_cot"], "temperature": [1.0, 0.6]}


def test_nothing_in_common_is_refused() -> None:
    with pytest.raises(UserError, match="no problem in common"):
        compare([record({"a": 0.5})], {"aime24": record({"b": 0.5})}, seed=0)
    with pytest.raises(UserError, match=r"no metric in common \(avg@8 and avg@32\)"):
        compare([record({"a": 0.5})], {"aime24": {**record({"a": 0.5}), "scores": {"avg@32": {"a": 0.5}}}}, seed=0)
    with pytest.raises(UserError, match="has math500"):
        compare([record({"a": 0.5})], {"math500": record({"a": 0.5})}, seed=0)


def test_one_benchmark_or_several_are_read(tmp_path: Path) -> None:
    one, several = record({"a": 0.5}), {"policy": "p", "benchmarks": {"aime24": record({"a": 0.5})}}
    for content in (one, several):
        (tmp_path / "r.json").write_text(json.dumps(content))
        assert read_result(tmp_path / "r.json") == {"aime24": one}


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"name": "x"}', '{"benchmarks": 3}', '{"benchmarks": {"a": 3}}'])
def test_another_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match="is not what"):
        read_result(tmp_path / "r.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_result(tmp_path / "none.json")


@pytest.mark.parametrize(
    "changes",
    [
        *({"scores": 3}, {"scores": {"avg@8": 3}}, {"scores": {"avg@8": {}}}, {"scores": {"avg@8": {"a": "x"}}}),
        *({"counts": None}, {"counts": ["a"]}, {"policy": None}),
    ],
)
def test_a_result_that_cannot_be_compared_is_refused_before_anything_is_sampled(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "r.json").write_text(json.dumps(record({"a": 0.5}) | changes))
    with pytest.raises(UserError, match="is not what"):
        read_result(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("math500", {}, "has math500, and none of these is evaluated now"),
        ("mine", {}, "two results of mine have no problem in common"),
        (
            "mine",
            {"counts": {"q1": [0, 8]}, "scores": {"avg@8": {"q1": 0}}},
            r"no metric in common \(avg@4, pass@1 and avg@8\)",
        ),
    ],
)
def test_what_has_nothing_in_common_is_refused_before_anything_is_sampled(
    name: str, changes: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It took the whole evaluation, whose results were then neither printed nor written."""
    write_model(tmp_path / "model", seed=0)
    (tmp_path / "mine.jsonl").write_text('{"id": "q1", "problem": "1,2=3", "answer": "3"}\n')
    (tmp_path / "other.json").write_text(json.dumps(record({"a": 0.5}, name=name) | changes))
    monkeypatch.setattr(evaluation, "PolicyEvaluation", None)
    typed = ["evaluate", "--policy", f"{tmp_path}/model", "--data", f"{tmp_path}/mine.jsonl", "experiment=tiny"]
    typed += ["--samples", "4", "--k", "1", "--against", f"{tmp_path}/other.json", "--out", f"{tmp_path}/out"]
    with pytest.raises(UserError, match=words):
        evaluation.evaluate(parse(typed))


def test_the_bytes_of_another_file_are_not_shown(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(b"\xe0" * 10_000)
    with pytest.raises(UserError, match="is not what") as caught:
        read_result(tmp_path / "r.json")
    assert len(str(caught.value)) < 300
