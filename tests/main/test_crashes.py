"""The third end of a kind at one place is the last that a scheduler gets to see."""

from __future__ import annotations

from pathlib import Path

import pytest

from rloop_mcore.compose import load_config
from rloop_mcore.errors import UserError
from rloop_mcore.journal import Journal
from rloop_mcore.main.crashes import CrashRecord
from rloop_mcore.main.run_directory import RunDirectory

ERROR = "rank 0: EngineError: http://127.0.0.1:{}/generate: connection failed after {} s\nthe end of its log"


def record(run: Path, *overrides: str) -> CrashRecord:
    given = ["model.path=m", "data.train=d", f"run.dir={run}"]
    return CrashRecord(RunDirectory(run), load_config([*given, *overrides]))


def commit(run: Path, step: int) -> None:
    Journal(run / "journal.jsonl").record("commit", iteration=0, phase="explore", step=step, shards=[])


def crash(run: Path, *overrides: str, error: str = ERROR.format(4000, 0.5)) -> str | None:
    """A start that is let in, and its end."""
    each = record(run, *overrides)
    each.check(force=False)
    return each.note(error)


def test_three_ends_of_a_kind_are_enough(tmp_path: Path) -> None:
    commit(tmp_path, 4)
    assert crash(tmp_path) is None
    assert crash(tmp_path, error=ERROR.format(4711, 12.25)) is None  # the same but for its numbers
    enough = crash(tmp_path, "cluster.job_end=1999-01-01")  # which a launcher sets anew for each job
    assert enough is not None
    assert enough.startswith("it has ended so 3 times in a row after iteration 0 explore, step 4")
    assert enough.endswith("mend it and add --force, or change a key, to try again")  # mended alone it is refused:
    with pytest.raises(UserError, match=r"ended 3 times in a row after iteration 0 explore, step 4, with the same"):
        record(tmp_path).check(force=False)
    record(tmp_path).check(force=True)
    assert crash(tmp_path) is None


@pytest.mark.parametrize("change", ["step", "config", "error"])
def test_another_step_configuration_or_error_counts_anew(tmp_path: Path, change: str) -> None:
    for _ in range(2):
        assert crash(tmp_path) is None
    if change == "step":
        commit(tmp_path, 1)
    overrides = ["cluster.threads=3"] if change == "config" else []
    error = "rank 0: ValueError: 7" if change == "error" else ERROR
    for _ in range(2):
        assert crash(tmp_path, *overrides, error=error) is None
    assert crash(tmp_path, *overrides, error=error) is not None


def test_a_changed_key_is_let_in_after_the_third(tmp_path: Path) -> None:
    for _ in range(3):
        said = crash(tmp_path)
    assert said is not None
    assert "before its first commit" in said
    record(tmp_path, "rollout.engines=2").check(force=False)
    with pytest.raises(UserError, match="before its first commit"):
        record(tmp_path).check(force=False)


def test_a_damaged_record_is_none(tmp_path: Path) -> None:
    (tmp_path / "crashes.json").write_text('{"times": 3}')
    assert crash(tmp_path) is None
