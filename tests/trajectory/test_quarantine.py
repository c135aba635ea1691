"""Damaged shards set aside: an exact account, and everything else goes on; held off while a run works."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from trajectory_rows import step_rows

from rloop_mcore.compose import load_config
from rloop_mcore.errors import UserError
from rloop_mcore.journal import Journal
from rloop_mcore.main import run_directory
from rloop_mcore.main.cache_upkeep import steps_lost
from rloop_mcore.main.cli import main
from rloop_mcore.run_config import to_yaml
from rloop_mcore.trajectory.cache import TrajectoryCache
from rloop_mcore.trajectory.quarantine import Loss, quarantine
from rloop_mcore.types import ExpertQuery


def write_run(folder: Path) -> list[str]:
    """Three steps: a shard with the first two, mixed, and one with the third."""
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(load_config(["experiment=tiny"])))
    cache, journal = TrajectoryCache(folder / "cache"), Journal(folder / "journal.jsonl")
    for steps in ((0, 1), (2,)):
        cache.append([row for step in steps for row in step_rows(0, step)[: 16 - step]])
        journal.record("commit", shards=[cache.seal()[-1]])
    return journal.shards()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "run")
    return tmp_path / "run"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (Path.unlink, "is missing"),
        (lambda path: os.truncate(path, 50), "has 50 bytes instead of"),
        (flip, "has another content than was sealed (its sha256 is wrong)"),
    ],
)
def test_the_account_is_exact_and_the_rest_goes_on(
    run: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], says: str
) -> None:
    shard = run / "cache" / "shard-000000.parquet"
    damage(shard)
    evidence = shard.read_bytes() if shard.exists() else None
    assert main(["cache", str(run), "--quarantine"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(f"shard-000000.parquet {says}")
    assert first.endswith(": 31 trajectories are lost")
    assert lines[:2] == [
        "lost of iteration 0, step 0: 16 of 16 trajectories",
        "lost of iteration 0, step 1: 15 of 15 trajectories",
    ]
    assert lines[2].startswith("left: 14 trajectories; ")
    assert len(lines) == 3
    aside = run / "cache" / "quarantine" / "shard-000000.parquet"
    assert (aside.read_bytes() if aside.exists() else None) == evidence

    assert main(["cache", str(run), "--verify"]) == 0
    verified = capsys.readouterr().out.splitlines()
    assert verified[0].endswith("is sound: 14 trajectories, every byte as it was sealed")
    assert verified[1:] == lines[:2]
    assert main(["cache", str(run)]) == 0
    summary = capsys.readouterr().out.splitlines()
    assert summary[-1] == "lost of iteration 0: 31 trajectories of 2 steps (--verify lists them)"
    assert main(["cache", str(run), "--quarantine"]) == 0
    assert capsys.readouterr().out.endswith("nothing is damaged\n")

    cache = TrajectoryCache(run / "cache")
    cache.keep_only(Journal(run / "journal.jsonl").shards())
    assert aside.exists() == (evidence is not None)
    wanted = step_rows(0, 2)[:14]
    assert sorted(cache.rows(), key=lambda row: row.key) == sorted(wanted, key=lambda row: row.key)
    assert sum(cache.success_histogram(0)) == len({row.problem_id for row in wanted})
    assert cache.count_experts(ExpertQuery((0,), None, deduplicate=False)) == sum(row.correct for row in wanted)
    cache.append(step_rows(0, 3))
    assert cache.seal()[-1] == "shard-000002.parquet"


def test_a_step_that_lost_a_part_says_how_much_is_left(tmp_path: Path) -> None:
    cache = TrajectoryCache(tmp_path)
    for part in (slice(0, 5), slice(5, 16)):
        cache.append(step_rows(2, 7)[part])
        cache.seal()
    (tmp_path / "shard-000001.parquet").unlink()
    quarantine(tmp_path)
    losses = TrajectoryCache(tmp_path).losses()
    assert losses == [Loss(2, 7, lost=11, left=5)]
    assert steps_lost(losses) == ["lost of iteration 2, step 7: 11 of 16 trajectories"]


def test_everything_may_be_lost(tmp_path: Path) -> None:
    cache = TrajectoryCache(tmp_path)
    cache.append(step_rows(0, 0))
    names = cache.seal()
    flip(tmp_path / names[0])
    quarantine(tmp_path)
    cache = TrajectoryCache(tmp_path)
    cache.keep_only(names)
    assert (cache.count(), cache.phases(), cache.count_experts(ExpertQuery((0,), 0.5))) == (0, [], 0)
    cache.append(step_rows(0, 1))
    assert cache.seal() == [*names, "shard-000001.parquet"]
    assert {path.name for path in (tmp_path / "quarantine").iterdir()} == set(names)


def test_a_run_that_has_sealed_nothing_has_nothing_damaged(tmp_path: Path) -> None:
    assert quarantine(tmp_path / "cache") == []
    assert not (tmp_path / "cache").exists()


def test_a_lost_shard_that_the_journal_does_not_name_is_forgotten(tmp_path: Path) -> None:
    """Its step is done again."""
    cache = TrajectoryCache(tmp_path)
    for step in range(2):
        cache.append(step_rows(0, step))
        cache.seal()
    (tmp_path / "shard-000001.parquet").unlink()
    quarantine(tmp_path)
    cache = TrajectoryCache(tmp_path)
    cache.keep_only(["shard-000000.parquet"])
    assert TrajectoryCache(tmp_path).losses() == []


def test_a_damaged_manifest_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(run / "cache" / "manifest.json")
    before = sorted((run / "cache").iterdir())
    assert main(["cache", str(run), "--quarantine"]) == 2
    assert "manifest.json is damaged" in capsys.readouterr().err
    assert sorted((run / "cache").iterdir()) == before


def test_small_shards_are_merged_by_the_command(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = TrajectoryCache(run / "cache").digest()
    for before in (2, 1):
        assert main(["cache", str(run), "--compact"]) == 0
        assert capsys.readouterr().out.endswith(f"45 trajectories; shards: {before} before, 1 now\n")
        assert TrajectoryCache(run / "cache").digest() == digest
    flip(run / "cache" / "shard-000000-000001.parquet")
    assert main(["cache", str(run), "--quarantine", "--verify"]) == 0
    assert "lost of iteration 0, step 2: 14 of 14 trajectories" in capsys.readouterr().out
    TrajectoryCache(run / "cache").keep_only(Journal(run / "journal.jsonl").shards())


@contextmanager
def another_process_in(run: Path) -> Iterator[None]:
    """That holds the directory as a run does."""
    code = (
        "import sys, pathlib\n"
        "from rloop_mcore.main.run_directory import RunDirectory\n"
        "with RunDirectory(pathlib.Path(sys.argv[1])).lock():\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield
        finally:
            process.stdin.close()


@pytest.mark.parametrize("option", ["--quarantine", "--compact"])
def test_neither_touches_a_cache_that_a_run_works_in(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    monkeypatch.setattr(run_directory, "_LOCK_WAIT_S", 0.3)
    if option == "--quarantine":
        (run / "cache" / "shard-000001.parquet").unlink()
    files = {path.name: path.read_bytes() for path in (run / "cache").iterdir() if path.is_file()}
    with another_process_in(run):
        assert main(["cache", str(run), option]) == 2
        assert "is in use by another run" in capsys.readouterr().err
        assert {path.name: path.read_bytes() for path in (run / "cache").iterdir() if path.is_file()} == files
    assert main(["cache", str(run), option]) == 0


def test_two_at_once_do_it_one_after_the_other(run: Path) -> None:
    digest = TrajectoryCache(run / "cache").digest()
    command = [sys.executable, "-m", "rloop_mcore.main.cli", "cache", str(run), "--compact"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=100)[0].strip().partition("shards: ")[2] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(said) == ["1 before, 1 now", "2 before, 1 now"]
    assert TrajectoryCache(run / "cache").digest() == digest


def test_an_open_damaged_cache_is_refused_and_says_what_to_do(run: Path) -> None:
    (run / "cache" / "shard-000001.parquet").unlink()
    with pytest.raises(UserError, match=rf"shard-000001\.parquet is missing.*`rloop cache {run} --quarantine`"):
        TrajectoryCache(run / "cache")
