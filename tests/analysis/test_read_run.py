"""Run directories as they are while a run goes on, when it has ended, and when they are damaged."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rloop_mcore.analysis.read_run import average_key, pass_keys, read_run
from rloop_mcore.errors import UserError


def test_evaluations_come_in_the_order_of_training(rloop_run: Path) -> None:
    run = read_run(rloop_run)
    assert [evaluation.name for evaluation in run.evaluations] == [
        "base",
        "i0_explore_000002",
        "i0_explore_000004",
        "i0_exploit_000000",
        "i1_explore_000004",
        "i1_exploit_000000",
    ]
    theta_1 = run.evaluations[3]
    assert (theta_1.iteration, theta_1.phase, theta_1.step, theta_1.average) == (0, "exploit", 0, 0.08)
    assert theta_1.policy == "policies/i0_exploit_000000"


def test_a_line_that_is_being_written_is_left_out(rloop_run: Path) -> None:
    whole = read_run(rloop_run)
    with (rloop_run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 1, "pha')
    assert read_run(rloop_run).metrics == whole.metrics


def test_a_run_that_has_only_just_begun_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text("")
    run = read_run(tmp_path)
    assert (run.metrics, run.evaluations, run.journal, run.config) == ([], [], [], "")


def test_a_run_whose_ranks_are_still_starting_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {dir: r}\n")
    assert read_run(tmp_path).settings == {"run": {"dir": "r"}}


def test_evaluations_under_other_names_are_not_checkpoints(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", {"base": 0.1, "held_out": 0.5}))
    assert [evaluation.name for evaluation in run.evaluations] == ["base"]


def test_what_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        read_run(tmp_path)


def test_damage_is_located(rloop_run: Path) -> None:
    (rloop_run / "metrics.jsonl").write_text("{}\nnot json\n{}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is no JSON object"):
        read_run(rloop_run)


@pytest.mark.parametrize(
    "line",
    [
        *("3", "[1]", "null", "{}", "[" * 100_000, '{"iteration": 0, "phase": 3, "step": 1, "global_step": 1}'),
        '{"iteration": 0, "phase": "explore", "step": 1, "global_step": 1, "loss": NaN}',
        '{"iteration": 0, "phase": "explore", "step": 1, "global_step": 1, "loss": "a"}',
    ],
    ids=lambda line: line[:12],
)
def test_a_line_of_metrics_that_is_of_no_step_is_located(line: str, rloop_run: Path) -> None:
    with (rloop_run / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    number = len((rloop_run / "metrics.jsonl").read_text().splitlines())
    with pytest.raises(UserError, match=rf"metrics\.jsonl, line {number}"):
        read_run(rloop_run)


@pytest.mark.parametrize(
    "content",
    [
        *("3", "null", "[" * 100_000, '{"metrics": [1]}', '{"metrics": null}', '{"metrics": {"avg@8": 1}}'),
        '{"metrics": {"avg@x": {"mean": 0, "low": 0, "high": 1}}}',
        '{"metrics": {"avg@8": {"mean": NaN, "low": 0, "high": 1}}}',
        '{"metrics": {"pass@8": {"mean": 0, "low": 0, "high": 1}}}',
        '{"metrics": {"avg@8": {"mean": 0, "low": 0, "high": 1}, "pass@8": 1}}',
        '{"metrics": {"avg@8": {"mean": 0, "low": 0, "high": 1}}, "policy": [1]}',
        '{"metrics": {"avg@8": {"mean": 0, "low": 0, "high": 1}}, "problem_digests": null}',
        '{"metrics": {"avg@8": {"mean": 0, "low": 0, "high": 1}}, "groups": {"source": {"a": {}}}}',
        '{"metrics": {"avg@8": {"mean": 0, "low": 0, "high": 1}}, "groups": {"source": {"a": {"metrics": {"b": 1}}}}}',
    ],
    ids=lambda content: content[:40],
)
def test_an_evaluation_of_another_form_is_refused_by_its_name(content: str, rloop_run: Path) -> None:
    (rloop_run / "evaluation" / "base.json").write_text(content)
    with pytest.raises(UserError, match=r"base\.json is not an evaluation"):
        read_run(rloop_run)


@pytest.mark.parametrize(
    "content", [b"[1]", b"a: [", b"caf\xe9: 1", b"[" * 100_000], ids=["list", "half", "latin-1", "nested"]
)
def test_a_configuration_that_is_none_is_located(content: bytes, rloop_run: Path) -> None:
    (rloop_run / "config.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.yaml") as caught:
        read_run(rloop_run)
    assert "\n" not in str(caught.value)


def test_an_evaluation_without_an_average_is_refused(rloop_run: Path) -> None:
    (rloop_run / "evaluation" / "base.json").write_text('{"metrics": {"pass@8": {}}}')
    with pytest.raises(UserError, match=r"base\.json is not an evaluation"):
        read_run(rloop_run)


def test_metric_names() -> None:
    metrics = dict.fromkeys(["avg@32", "pass@1", "pass@32", "pass@8", "pass@16"])
    assert average_key(metrics) == "avg@32"
    assert pass_keys(metrics) == ["pass@8", "pass@16", "pass@32"]
