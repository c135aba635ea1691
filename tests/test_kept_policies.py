"""Which policies a run keeps, from its journal alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rloop_mcore.config import CheckpointConfig
from rloop_mcore.errors import UserError
from rloop_mcore.journal import Journal
from rloop_mcore.kept_policies import best, removable, removed
from rloop_mcore.main.cli import main
from rloop_mcore.main.run_directory import check_not_removed


def measure(journal: Journal, name: str, average: float | None, path: str | None = None) -> None:
    metrics = {} if average is None else {"pass@8": 1 - average, "avg@8": average}
    journal.record("measured", name=name, path=path or f"policies/{name}", digest=name, metrics=metrics)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    """Iteration 0 is done, iteration 1 explores."""
    journal = Journal(tmp_path / "journal.jsonl")
    journal.record("policy", iteration=0, path="/models/base", digest="b")
    measure(journal, "base", 0.9, "/models/base")
    for step, average in [(2, 0.3), (4, 0.5), (6, 0.1)]:
        journal.record("commit", iteration=0, phase="explore", step=step)
        measure(journal, f"i0_explore_{step:06d}", average)
    journal.record("policy", iteration=1, path="policies/theta_1", digest="t")
    journal.record("done", iteration=0, phase="exploit")
    measure(journal, "i0_exploit_000000", 0.5, "policies/theta_1")
    measure(journal, "i1_explore_000002", 0.2)
    measure(journal, "i1_explore_000004", 0.15)
    return journal


def names(paths: list[str]) -> list[str]:
    return [path.removeprefix("policies/") for path in paths]


def test_the_best_is_the_highest_average_of_what_was_trained_the_earlier_of_equals(journal: Journal) -> None:
    found = best(journal.records)
    assert found is not None
    assert (found.name, found.metric, found.average) == ("i0_explore_000004", "avg@8", 0.5)


def test_theta_0_is_the_best_until_something_else_was_evaluated(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    measure(journal, "i0_explore_000004", None)
    assert best(journal.records) is None
    for name, average in [("base", 0.9), ("i0_explore_000006", 0.1)]:
        measure(journal, name, average)
        found = best(journal.records)
        assert found is not None
        assert found.name == name


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CheckpointConfig(keep_best=0), []),
        # theta_1 is second best and is kept anyway; i1_explore_000004 may become the endpoint of iteration 1
        (CheckpointConfig(keep_best=1), ["i0_explore_000002", "i0_explore_000006", "i1_explore_000002"]),
        (CheckpointConfig(keep_best=3), ["i0_explore_000006", "i1_explore_000002"]),
        (CheckpointConfig(keep_best=1, policy_steps=[2]), ["i0_explore_000006"]),
        (CheckpointConfig(keep_best=9), []),
    ],
)
def test_what_nothing_needs_may_go(journal: Journal, config: CheckpointConfig, expected: list[str]) -> None:
    assert names(removable(journal, config)) == expected


def test_what_is_gone_does_not_go_again(journal: Journal) -> None:
    config = CheckpointConfig(keep_best=1)
    journal.record("removed", paths=removable(journal, config))
    assert removable(journal, config) == []
    assert "policies/i0_explore_000006" in removed(journal.records)


def test_what_a_commit_or_a_theta_names_stays(journal: Journal) -> None:
    journal.record("commit", iteration=1, phase="explore", step=2, path="policies/i1_explore_000002", digest="d")
    journal.record("policy", iteration=2, path="policies/i0_explore_000006", digest="e")
    assert names(removable(journal, CheckpointConfig(keep_best=1))) == ["i0_explore_000002"]


def test_a_removed_policy_is_refused_in_words(
    journal: Journal, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal.record("removed", paths=["policies/i0_explore_000002"])
    policy = tmp_path / "policies" / "i0_explore_000002"
    with pytest.raises(UserError, match=r"was removed: checkpoint\.keep_best of that run kept better ones, the"):
        check_not_removed(policy)
    for arguments in (
        ["evaluate", "--policy", str(policy), "--data", "countdown:test"],
        ["convert", str(policy), str(tmp_path / "out")],
        ["train", f"model.path={policy}", "data.train=countdown:train", f"run.dir={tmp_path / 'new'}"],
    ):
        assert main(arguments) == 2
        said: Any = capsys.readouterr().err
        assert said.startswith(f"rloop: {policy} was removed")
        assert said.endswith(f"the best is {tmp_path}/policies/i0_explore_000004.\n")
    check_not_removed(tmp_path / "policies" / "never_there")
