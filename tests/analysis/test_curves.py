import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rloop_mcore.analysis import curves
from rloop_mcore.analysis.figures import sections
from rloop_mcore.analysis.read_run import read_run
from rloop_mcore.analysis.report import write_report


def test_training_runs_over_the_steps_of_all_iterations(rloop_run: Path) -> None:
    series = curves.training(read_run(rloop_run), "success_rate")
    assert series.x == [1, 2, 3, 4, 5, 6, 7, 8]
    assert series.y == pytest.approx([0.325, 0.55, 0.775, 1.0] * 2)


def test_missing_values_break_the_line_and_missing_keys_draw_nothing(rloop_run: Path) -> None:
    run = read_run(rloop_run)
    assert curves.training(run, "grad_norm").y == [0.3, None, 0.3, 0.3] * 2
    assert not curves.training(run, "mismatch_max")


def test_validation_starts_each_iteration_at_its_theta(rloop_run: Path) -> None:
    series = curves.validation(read_run(rloop_run), "avg@32")
    assert list(zip(series.x, series.y, series.labels, strict=True)) == [
        (0, 0.06, "θ0"),
        (2, 0.10, "RL, iteration 1, step 2"),
        (4, 0.14, "RL, iteration 1, step 4"),
        (4, None, ""),
        (4, 0.08, "θ1"),
        (8, 0.20, "RL, iteration 2, step 4"),
        (8, None, ""),
        (8, 0.12, "θ2"),
    ]
    assert series.low[0] == pytest.approx(0.02)
    assert series.high[0] == pytest.approx(0.11)


def test_each_source_of_the_problems_has_a_curve_of_its_own(make_run: Callable[..., Path], tmp_path: Path) -> None:
    averages, sources = {"base": 0.1, "i0_explore_000004": 0.2}, {"aime24": 0.01, "amc": 0.3}
    run = read_run(make_run(tmp_path / "run", averages, sources=sources))
    assert (curves.validation(run, "avg@32").y, curves.validation(run, "avg@32", "amc").y) == ([0.1, 0.2], [0.3, 0.3])
    titles = [figure.title for section in sections([run]) for figure in section.figures]
    assert [title for title in titles if title.startswith("Validation")] == ["Validation avg@32"] + [
        f"Validation pass@{k}" for k in (32, 16, 8)
    ] + [f"Validation {metric}, {source}" for source in ("aime24", "amc") for metric in ("avg@32", "pass@32")]


def test_vanilla_lies_under_the_same_axis(rloop_run: Path, dapo_run: Path) -> None:
    rloop, dapo = read_run(rloop_run), read_run(dapo_run)
    assert curves.validation(dapo, "avg@32").x == [0, 4, 8]
    assert curves.rl_steps(rloop) == curves.rl_steps(dapo) == 8
    assert (curves.iteration_starts(rloop), curves.iteration_starts(dapo)) == ([4], [])


def test_a_phase_that_ended_early_shifts_what_follows(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """Iteration 0 ended after 2 of its 4 steps, as the guard has it."""
    path = make_run(tmp_path / "run", {"base": 0.1, "i0_explore_000002": 0.2, "i1_explore_000004": 0.3})
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["iteration"] == 1 or line["step"] <= 2]
    shifted = [line | {"global_step": line["global_step"] - 2 * line["iteration"]} for line in kept]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in shifted))
    records = [
        {
            "event": "guard",
            "iteration": 0,
            "phase": "explore",
            "step": 2,
            "policy": "end_phase",
            "early": True,
            "reason": "a",
        },
        {"event": "guard", "iteration": 1, "phase": "explore", "step": 3, "policy": "skip", "reason": "b"},
        {"event": "guard", "iteration": 1, "phase": "exploit", "step": 1, "policy": "end_phase", "reason": "c"},
        {
            "event": "guard",
            "iteration": 1,
            "phase": "explore",
            "step": 4,  # the last one
            "policy": "end_phase",
            "early": False,
            "reason": "d",
        },
    ]
    (path / "journal.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run = read_run(path)
    assert curves.ended_early(run) == [0]
    assert curves.training(run, "success_rate").x == [1, 2, 3, 4, 5, 6]
    assert curves.validation(run, "avg@32").x == [0, 2, 6]
    assert (curves.rl_steps(run), curves.iteration_starts(run)) == (6, [2])
    write_report([path], tmp_path / "report.html")
    assert "6, iteration 1 ended early by the guard" in (tmp_path / "report.html").read_text()


def test_the_gap_is_of_the_steps_before_each_checkpoint(rloop_run: Path) -> None:
    """Training success is 0.325, 0.55, 0.775, 1.0 in each iteration."""
    gap = curves.overfitting_gap(read_run(rloop_run))
    assert gap.x == [2, 4, 8]
    assert gap.y == pytest.approx([(0.325 + 0.55) / 2 - 0.10, (0.775 + 1.0) / 2 - 0.14, 2.65 / 4 - 0.20])


def test_a_step_without_a_success_rate_is_not_in_the_gap(rloop_run: Path) -> None:
    path = rloop_run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    second = json.loads(lines[1]) | {"success_rate": None}
    path.write_text("\n".join([lines[0], json.dumps(second), *lines[2:]]) + "\n")
    assert curves.overfitting_gap(read_run(rloop_run)).y[0] == pytest.approx(0.325 - 0.10)


def test_by_iteration(rloop_run: Path) -> None:
    run = read_run(rloop_run)
    thetas, endpoints = curves.thetas(run, "avg@32"), curves.rl_endpoints(run, "avg@32")
    assert (thetas.x, thetas.y) == ([0, 1, 2], [0.06, 0.08, 0.12])
    assert (endpoints.x, endpoints.y) == ([1, 2], [0.14, 0.20])


def test_experts_and_cost(rloop_run: Path, dapo_run: Path) -> None:
    run = read_run(rloop_run)
    assert (curves.experts(run, "experts").x, curves.experts(run, "experts").y) == ([1, 2], [30, 12])
    assert curves.seconds_by_stage(run) == {"generate": 16.0, "update": 10.0}
    assert curves.fine_tuning_share(run) == pytest.approx({"tokens": 200 / 2600, "seconds": 2 / 26})
    assert curves.fine_tuning_share(read_run(dapo_run)) == {}
