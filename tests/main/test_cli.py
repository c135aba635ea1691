"""How `rloop` ends at a mistake, and where a file can't be read or written: one sentence, and nothing is half done."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rloop_mcore.main.arguments import parse
from rloop_mcore.main.cli import main
from rloop_mcore.main.run_directory import RunDirectory


def refuse(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `rloop status` meet this error; root, which may run the tests, may read everything."""

    def fail(run: Path, as_json: bool) -> int:
        raise error

    monkeypatch.setattr("rloop_mcore.main.status.status", fail)


@pytest.mark.parametrize(
    ("number", "paths", "code", "words"),
    [
        (errno.EACCES, ("a/config.yaml",), 2, "a/config.yaml can't be read or written: Permission denied"),
        (errno.EISDIR, ("a/.tmp-12-out", None, "a/out"), 2, "a/out can't be read or written: Is a directory"),
        (errno.EROFS, ("a/.tmp-12-out",), 2, "a/out can't be read or written: Read-only file system"),
        (errno.ENOSPC, (), 1, "no space is left"),
    ],
)
def test_a_file_that_fails_is_a_sentence(
    number: int,
    paths: tuple[str | None, ...],
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    refuse(OSError(number, os.strerror(number), *paths), monkeypatch)
    assert main(["status", "run"]) == code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["status", "/nowhere"], "/nowhere is not a run directory"),
        (["report", "/nowhere"], "/nowhere is not a run directory"),
        (["report", "/nowhere", "--live"], "/nowhere is not a run directory"),
        (["report", "/nowhere", "--live", "--out", "page.html"], "--live serves the page and writes no file"),
        (["report", "/nowhere", "--port", "8000"], "--port 8000 is of --live"),
        (["compare", "/nowhere", "/nowhere"], "/nowhere is not a run directory"),
        (["evaluate", "--policy", "/nowhere", "--data", "countdown:test"], "--policy /nowhere holds no config.json"),
        (["evaluate", "--policy", "/nowhere", "--step", "last", "--data", "x"], "/nowhere is not a run directory"),
        (
            ["evaluate", "--policy", "/nowhere", "--data", "x", "--against", "/none.json"],
            "--against /none.json cannot be",
        ),
        (["grade", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["train", "experiment=tiny", "run.dir=/proc/x"], "run.dir=/proc/x cannot be created"),
        (["train", "experiment=tiny", "algorithm.rl_step=3"], "did you mean algorithm.rl_steps?"),
        (["train", "experiment=tiny", "data.train=countdown:all"], "countdown has the splits"),
        (["train", "experiment=tiny", "data.template=none"], "data.template 'none' not found"),
        (["train", "experiment=tiny", "layout.tp=3"], "layout.tp=3 does not divide"),
        (["train", "experiment=tiny", "layout.dp=100000"], "layout.* starts 100000 ranks on this machine"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments[0] == "train" and not any(word.startswith("run.dir") for word in arguments):
        arguments = [*arguments, f"run.dir={tmp_path / 'run'}"]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.strip().splitlines()) == 1


@pytest.mark.parametrize("command", ["report", "compare", "trace"])
def test_a_run_that_is_read_only_is_told_with_what_to_do_before_the_work(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("journal.jsonl", "timeline.jsonl"):
        (tmp_path / name).touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write where the mode forbids it
    assert main([command, str(tmp_path), *([str(tmp_path)] if command == "compare" else [])]) == 2
    assert "can't be written to: say with --out where" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["journal.jsonl", "timeline.jsonl"]


def test_a_folder_that_is_gone_around_the_command_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gone").mkdir()
    os.chdir("gone")
    (tmp_path / "gone").rmdir()
    assert main(["plan", "experiment=tiny"]) == 2
    assert capsys.readouterr().err == "rloop: the folder that you are in was removed: go to one that is there.\n"


@pytest.mark.parametrize("number", [errno.ENOENT, errno.ECONNREFUSED])
def test_other_failures_keep_their_traceback(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(OSError(number, os.strerror(number), "a"), monkeypatch)
    with pytest.raises(OSError, match=os.strerror(number)):
        main(["status", "run"])


@pytest.mark.parametrize(
    "words",
    [
        ["grade", "f.jsonl", "--json"],
        ["report", "run", "--out"],
        ["compare", "a", "b", "--out"],
        ["compare", "a", "b", "--json"],
        ["cache", "run", "--export"],
        ["trace", "run", "--out"],
        ["evaluate", "--policy", "p", "--json"],
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for path, why in (
        (tmp_path, f"{tmp_path} is no ordinary file"),
        (tmp_path / "file" / "x", f"{tmp_path / 'file'}: Not a directory"),
        (tmp_path / ("x" * 250), "too long"),  # what is unfinished has a longer name
        ("/proc/x", "cannot be written in /proc"),  # whose modes say that root may write there
        ("/dev/null", "ordinary"),
        ("/", "ordinary"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([*words, str(path)])
        assert caught.value.code == 2
        assert why in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file"]
    assert parse([*words, str(tmp_path / "new" / "file")])


@pytest.mark.parametrize("folder", ["file", "file/x", "/proc/x"])
def test_a_folder_that_cannot_be_made_is_refused_before_the_work(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as caught:
        main(["report", "run", "--export", str(tmp_path / folder)])
    assert caught.value.code == 2
    assert "cannot be written in" in capsys.readouterr().err
    assert parse(["report", "run", "--export", str(tmp_path / "new/folder")])


def test_a_reader_that_has_seen_enough_is_no_fault() -> None:
    """`rloop plan --json | head`."""
    script = "import sys; from rloop_mcore.main.cli import main; sys.stdin.read(); sys.exit(main())"
    command = [sys.executable, "-c", script, "plan", "model=qwen2.5_7b", "--json"]
    planning = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert planning.stdout is not None
    planning.stdout.close()
    planning.stdout = None  # communicate would read it
    _, said = planning.communicate(timeout=60)
    assert (planning.returncode, said) == (141, "")


def test_a_reader_of_a_table_that_has_seen_enough_is_no_fault() -> None:
    """`rloop plan | head`: rich, which writes it, would leave with 1."""
    command = [sys.executable, "-m", "rloop_mcore.main.cli", "plan", "model=qwen2.5_7b"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as planning:
        assert planning.stdout is not None
        planning.stdout.close()
        planning.stdout = None
        _, said = planning.communicate(timeout=60)
    assert (planning.returncode, said) == (141, "")


@pytest.mark.parametrize(("closed", "code"), [(">&-", 0), (">&- 2>&-", 0), ("2>&-", 0)])
def test_a_command_that_is_started_without_its_streams(closed: str, code: int) -> None:
    shell = f"exec {shlex.quote(sys.executable)} -m rloop_mcore.main.cli plan experiment=tiny {closed}"
    done = subprocess.run(["sh", "-c", shell], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, "")


def test_a_terminal_that_is_gone_reads_no_more() -> None:
    terminal, end = os.openpty()
    script = "import sys; from rloop_mcore.main.cli import main; sys.stdin.read(); sys.exit(main())"
    command = [sys.executable, "-c", script, "plan", "model=qwen2.5_7b", "--json"]
    planning = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=end, stderr=subprocess.PIPE, text=True)
    os.close(end)
    os.close(terminal)
    _, said = planning.communicate(timeout=60)
    assert (planning.returncode, said) == (141, "")


def test_messages_that_nobody_can_read_change_no_exit_code() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "rloop_mcore.main.cli", "plan", "model=qwen2.5_7b", "layout.tp=5"]
        assert subprocess.run(command, stderr=full, timeout=60).returncode == 2


def test_another_broken_pipe_is_a_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refuse(BrokenPipeError(errno.EPIPE, "of an engine"), monkeypatch)
    with open(tmp_path / "out", "w") as out, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", out)
        with pytest.raises(BrokenPipeError):
            main(["status", "run"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_told_to_stop_before_it_has_begun_wants_to_be_started_again(
    number: signal.Signals, tmp_path: Path
) -> None:
    """Slurm's warning comes that early where a job has no more time than that."""
    run = RunDirectory(tmp_path / "run")
    command = [sys.executable, "-m", "rloop_mcore.main.cli", "train", "experiment=tiny", f"run.dir={run.path}"]
    with run.lock(), subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        lock = str(run.path / "lock")
        while lock not in {file.path for file in psutil.Process(process.pid).open_files()}:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert said == f"rloop: {number.name} came while no rank was running; the same command goes on\n"
    assert process.returncode == 75
    assert run.ending() is None
