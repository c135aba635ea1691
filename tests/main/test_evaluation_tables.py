"""What `rloop evaluate` prints, number by number."""

from __future__ import annotations

from typing import Any

import pytest

from rloop_mcore.main.evaluation_tables import print_comparison, print_results


def interval(mean: float, low: float, high: float) -> dict[str, float]:
    return {"mean": mean, "low": low, "high": high}


def record(name: str, **more: Any) -> dict[str, Any]:
    return {
        "policy": "runs/a/policies/[b]",
        "name": name,
        "metrics": {"avg@4": interval(0.5, 0.4, 0.625), "maj@4": interval(0.75, 0.5, 1.0)},
        "response_length": 123.44,
        "truncated": 0.125,
        "problems": 30,
        "too_long": 2,
        "bad_golds": 1,
        "groups": {},
        "sampling": {"samples": 4, "temperature": 0.7, "top_p": 0.9, "max_tokens": 99},
        "template": "chat",
        "answer_format": "boxed",
        "verifier": "math",
        "samples": f"evaluations/{name}/samples",
        **more,
    }


def cells(printed: str) -> list[list[str]]:
    """The rows of all tables."""
    rows = (line.replace("┃", "│").split("│")[1:-1] for line in printed.splitlines())
    return [[cell.strip() for cell in row] for row in rows if row]


def test_results_stand_in_a_column_a_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"avg@4": interval(0.3, 0.2, 0.4)}
    group = {"problems": 20, "metrics": metrics, "response_length": 77.6, "truncated": 0.05}
    hard = record("hard", metrics={"avg@4": interval(0.1, 0.0, 0.25), "maj@4": metrics["avg@4"]})
    easy = record("easy", groups={"level": {"2": {**group, "metrics": {**metrics, "maj@4": metrics["avg@4"]}}}})
    print_results([easy, hard], metrics)
    printed = capsys.readouterr().out
    assert "runs/a/policies/[b]" in printed
    assert cells(printed) == [
        ["metric", "easy", "hard", "mean"],
        ["avg@4", "50.00 [40.00, 62.50]", "10.00 [0.00, 25.00]", "30.00 [20.00, 40.00]"],
        ["tokens a response", "123.4", "123.4", ""],
        ["cut at the limit", "12.5%", "12.5%", ""],
        ["problems", "30", "30", ""],
        ["left out as too long", "2", "2", ""],
        ["with a gold that fails", "1", "1", ""],
        ["level", "problems", "avg@4", "tokens", "cut"],
        ["2", "20", "30.0", "78", "5%"],
    ]
    assert "4 responses a problem, temperature 0.7, top-p 0.9, at most 99 tokens; template chat" in printed
    assert "samples: evaluations/hard/samples" in printed


def test_one_benchmark_has_no_mean(capsys: pytest.CaptureFixture[str]) -> None:
    one = record("easy")
    print_results([one], one["metrics"])
    assert cells(capsys.readouterr().out)[:2] == [["metric", "easy"], ["avg@4", "50.00 [40.00, 62.50]"]]


def test_a_comparison_is_in_points(capsys: pytest.CaptureFixture[str]) -> None:
    difference = interval(-0.0125, -0.05, 0.025) | {"p_value": 0.03125}
    found = {
        "policy": "a",
        "other": "b",
        "problems": 20,
        "problems_each": [20, 30],
        "differing": {"seed": [0, 1]},
        "metrics": {"avg@4": difference},
    }
    print_comparison({"benchmarks": {"easy": found}})
    printed = capsys.readouterr().out
    assert "easy: a minus b" in printed
    assert cells(printed)[1] == ["avg@4", "-1.25", "-5.00 to +2.50", "0.0312"]
    assert "only the problems in both count: 20 of 20 and 30" in printed
    assert "warning: seed differs: 0 here, 1 there" in printed
    print_comparison({"benchmarks": {"easy": found | {"problems_each": [20, 20]}}})
    assert "only the problems in both" not in capsys.readouterr().out
