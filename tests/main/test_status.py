"""`rloop status`: the best checkpoint so far and why a run stopped, from its files."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from pathlib import Path

import pytest

from rloop_mcore.compose import load_config
from rloop_mcore.errors import UserError
from rloop_mcore.journal import Journal
from rloop_mcore.main.run_directory import RunDirectory
from rloop_mcore.main.status import read_status, status
from rloop_mcore.run_config import to_yaml
from rloop_mcore.trajectory.cache import TrajectoryCache


def test_the_best_checkpoint_and_the_last_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(tmp_path)
    run.config.write_text(to_yaml(load_config([f"run.dir={tmp_path}", "model.path=m", "data.train=d"])))
    status(tmp_path, as_json=True)
    empty = json.loads(capsys.readouterr().out)
    assert (empty["best"], empty["message"]) == (None, None)

    journal = Journal(run.journal)
    for name, average in [("i0_explore_000020", 0.2), ("i0_explore_000040", 0.3), ("i0_explore_000060", 0.1)]:
        journal.record("measured", name=name, path=f"policies/{name}", digest=name, metrics={"avg@32": average})
    journal.record("removed", paths=["policies/i0_explore_000020"])
    run.write_ending(75, "stopped: SIGTERM came; the same command goes on from here")
    status(tmp_path, as_json=True)
    state = json.loads(capsys.readouterr().out)
    name = "i0_explore_000040"
    assert state["best"] == {"name": name, "path": f"{tmp_path}/policies/{name}", "avg@32": 0.3}
    assert state["message"] == "stopped: SIGTERM came; the same command goes on from here"
    status(tmp_path, as_json=False)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"best name {name} path {tmp_path}/policies/{name} avg@32 0.3" in printed
    assert "guard" not in printed  # nor whatever else there is nothing to say of


def test_a_step_is_told_with_how_many_its_phase_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(tmp_path)
    run.config.write_text(to_yaml(load_config([f"run.dir={tmp_path}", "model.path=m", "data.train=d"])))
    journal = Journal(run.journal)
    for iteration, experts in enumerate((10, 12)):
        journal.record("done", iteration=iteration, phase="select", experts=experts)
    journal.record("commit", iteration=0, phase="explore", step=7)
    logged = {"iteration": 0, "phase": "explore", "step": 8, "total": 300, "loss": 0.5, "lr": 1e-6}
    for phase, step in (("explore", "7 of 300"), ("exploit", "7")):  # which is not committed yet
        (tmp_path / "metrics.jsonl").write_text(json.dumps(logged | {"phase": phase}) + "\n")
        status(tmp_path, as_json=False)
        printed = capsys.readouterr().out.splitlines()
        assert f"step           {step}" in printed
        assert "expert         10 trajectories of iteration 0; 12 trajectories of iteration 1" in printed
        assert "metrics        loss 0.500" in printed  # and nothing of the learning rate


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "cache/manifest.json"])
def test_a_file_nested_without_end_is_damage(name: str, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.config.write_text(to_yaml(load_config([f"run.dir={tmp_path}", "model.path=m", "data.train=d"])))
    run.cache.mkdir()
    (tmp_path / name).write_text("[" * 100_000 + "\n")
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / name}")):
        read_status(run)


def test_a_lost_journal_is_said_as_a_start_would_say_it(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.config.write_text(to_yaml(load_config([f"run.dir={tmp_path}", "model.path=m", "data.train=d"])))
    (tmp_path / "policies/i0_start").mkdir(parents=True)
    with pytest.raises(UserError, match=r"journal.jsonl is gone or holds no record"):
        read_status(run)


@pytest.mark.parametrize("words", ["[/__w/pytorch/gloo/pair.cc:547] Connection closed", "[enforce fail at alloc.cpp]"])
def test_last_words_in_brackets_are_printed_as_they_are(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(tmp_path)
    run.config.write_text(to_yaml(load_config([f"run.dir={tmp_path}", "model.path=m", "data.train=d"])))
    run.write_ending(1, words)
    status(tmp_path, as_json=False)
    assert words in capsys.readouterr().out


def test_only_json_has_the_digest_of_the_cache_which_takes_reading_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(tmp_path)
    run.config.write_text(to_yaml(load_config([f"run.dir={tmp_path}", "model.path=m", "data.train=d"])))
    run.cache.mkdir()
    monkeypatch.setattr(TrajectoryCache, "digest", lambda self: "d" * 64)
    status(tmp_path, as_json=True)
    assert json.loads(capsys.readouterr().out)["cache"] == {"trajectories": 0, "digest": "d" * 64}
    status(tmp_path, as_json=False)
    assert "ddd" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", [b"\xcc\xff\n", b'{"a": 1}\n{"b"\n', b"[1]\n", b'[["a", 1]]\n', b"[" * 100_000 + b"\n"]
)
def test_damaged_metrics_are_a_sentence_and_a_line_that_is_being_written_is_none(
    content: bytes, tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path)
    run.config.write_text(to_yaml(load_config([f"run.dir={tmp_path}", "model.path=m", "data.train=d"])))
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line \d is no JSON object"):
        status(tmp_path, as_json=True)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"a": 1}\n{"b"')
    assert read_status(run)["metrics"] == {"a": 1}


def test_a_damaged_last_word_is_none(tmp_path: Path) -> None:
    for content in (b"\xff", b"3", b"{}", b'[["code", 1], ["message", "a"]]', b"[" * 100_000):
        (tmp_path / "ending.json").write_bytes(content)
        assert RunDirectory(tmp_path).ending() is None


@pytest.mark.parametrize("content", [None, b"", b"\x00" * 500])
def test_a_run_without_a_word_in_its_journal_is_not_begun_over_its_policies(
    content: bytes | None, tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path)
    run.config.touch()
    (tmp_path / "policies" / "theta_0").mkdir(parents=True)
    if content is not None:
        run.journal.write_bytes(content)
    with pytest.raises(UserError, match="restore it"):
        run.create()
    run.journal.unlink(missing_ok=True)
    Journal(run.journal).record("started")
    run.create()


def test_who_asks_whether_a_run_works_keeps_nobody_else_from_asking(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    (tmp_path / "lock").touch()
    descriptor = os.open(tmp_path / "lock", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    assert not run.locked()
    os.close(descriptor)
    with run.lock():
        assert run.locked()


def test_nfs_is_asked_as_it_wants_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a lock for one process alone only of a file that is open for writing (flock(2), NFS details)."""
    real = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        if operation & fcntl.LOCK_EX and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(descriptor, operation)

    monkeypatch.setattr("fcntl.flock", flock)
    run = RunDirectory(tmp_path)
    with run.lock():
        assert run.locked()
    assert not run.locked()


def test_a_file_system_without_locks_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(UserError, match=f"{tmp_path}/lock cannot be locked"), RunDirectory(tmp_path).lock():
        pass
