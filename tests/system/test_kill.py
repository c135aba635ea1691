"""kill -9 of any process at any moment, then the same command again: the same weights and cache, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import runs

from rloop_mcore.main.run_directory import RunDirectory

pytestmark = pytest.mark.system

Condition = Callable[[list[dict[str, Any]]], bool]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("kill") / "undisturbed"
    runs.finish(runs.start(run_dir), run_dir)
    return run_dir


def has(event: str, iteration: int, phase: str, step: int = 0) -> Condition:
    return lambda records: any(
        r["event"] == event and r["iteration"] == iteration and r["phase"] == phase and r.get("step", 0) >= step
        for r in records
        if "phase" in r
    )


# (what the journal shows when the signal is sent, which process it hits): one place in every kind of phase; iteration 1
# is stopped below, and `make kill-campaign` kills anywhere
KILLS: list[tuple[str, Condition, str]] = [
    ("before the first record", lambda records: True, "all"),
    ("in the SFT of the base", has("commit", 0, "sft", 30), "rank"),
    ("while theta_0 is measured", has("commit", 0, "sft", 100), "all"),
    ("in iteration 0's exploration", has("commit", 0, "explore", 1), "engine"),
    ("while an RL checkpoint is measured", has("commit", 0, "explore", 2), "torchrun"),
    ("after iteration 0's exploration", has("commit", 0, "explore", 4), "supervisor"),
    ("in iteration 0's exploitation", has("done", 0, "select"), "rank"),
    ("after iteration 0's exploitation", has("done", 0, "exploit"), "all"),
]


def kill_at(process: subprocess.Popen[bytes], run_dir: Path, place: str, condition: Condition, role: str) -> None:
    def reached() -> bool:
        return condition(runs.records(run_dir)) and (role == "all" or role in runs.tree(process))

    runs.wait_for(place, reached, process)
    everyone = runs.kill(process, role)
    assert not has("done", 1, "evaluate")(runs.records(run_dir)), f"{place}: the run was done already"
    if role in runs.REPLACED:
        runs.wait_for(f"another {role}", lambda: runs.tree(process).get(role, everyone[0]) not in everyone, process)
    print(f"{place}: killed {role}, journal at record {len(runs.records(run_dir))}")


def listening(process: psutil.Process) -> set[str]:
    """The addresses at which a process can be called."""
    with suppress(psutil.NoSuchProcess):  # a helper that ended meanwhile
        return {found.laddr.ip for found in process.net_connections() if found.status == psutil.CONN_LISTEN}
    return set()


def stop_at(process: subprocess.Popen[bytes], run_dir: Path, place: str, condition: Condition) -> None:
    """Tell a run to stop as schedulers do, which signal every process of a job."""
    runs.wait_for(place, lambda: condition(runs.records(run_dir)), process)
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert {place for each in everyone for place in listening(each)} == {"127.0.0.1"}
    for each in everyone:
        with suppress(psutil.NoSuchProcess):  # a helper that ended meanwhile
            each.send_signal(signal.SIGUSR1)
    assert process.wait(runs.DEADLINE_S) == 75
    state = runs.status(run_dir)
    assert state["state"] == "interrupted"
    assert state["message"] == "stopped: SIGUSR1 came; the same command goes on from here"


def metrics_places(run_dir: Path) -> list[tuple[int, str, int]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["iteration"], line["phase"], line["step"]) for line in lines]


@pytest.mark.timeout(900)
def test_kills_in_every_phase_and_a_stop_leave_no_trace(undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "killed"
    process = runs.start(run_dir)
    for place, condition, role in KILLS:
        kill_at(process, run_dir, place, condition, role)
        if role not in runs.REPLACED:
            process = runs.start(run_dir)
    stop_at(process, run_dir, "iteration 1's second RL step", has("commit", 1, "explore", 2))
    runs.finish(runs.start(run_dir), run_dir)
    expected, found = runs.status(undisturbed), runs.status(run_dir)
    for key in ("state", "policy_digest", "base_digest", "cache", "expert"):
        assert found[key] == expected[key], key
    assert metrics_places(run_dir) == metrics_places(undisturbed)
    assert expected["state"] == "finished"
    assert found["best"]["name"] == expected["best"]["name"]
    assert Path(found["best"]["path"]).is_dir()
    assert all(expected["expert"])


@pytest.mark.timeout(300)
def test_an_idle_directory_is_locked_while_a_run_works_in_it(undisturbed: Path) -> None:
    with RunDirectory(undisturbed).lock():
        second = runs.rloop("train", "experiment=tiny", f"run.dir={undisturbed}")
    assert second.returncode == 2
    assert "in use by another run" in second.stderr


@pytest.mark.timeout(300)
def test_a_finished_run_started_again_changes_nothing(undisturbed: Path) -> None:
    before, files = runs.status(undisturbed), contents(undisturbed)
    again = runs.rloop("train", "experiment=tiny", f"run.dir={undisturbed}")
    assert again.returncode == 0, again.stderr
    assert again.stderr == (
        f"rloop: {undisturbed} is finished: see `rloop status` and `rloop report`; a larger algorithm.iterations goes "
        "on\n"
    )
    assert contents(undisturbed) == files
    printed = runs.rloop("status", str(undisturbed), "--json")
    assert json.loads(printed.stdout) == before


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.timeout(300)
def test_a_run_stops_before_its_job_ends_and_does_not_start_where_no_step_fits(tmp_path: Path) -> None:
    run_dir = tmp_path / "stopped"
    # 20 s from now no step fits any more: that is in the SFT of the base
    end = time.time() + 3600 + 20
    assert runs.start(run_dir, f"cluster.job_end={end}", "cluster.stop_margin_s=3600").wait(runs.DEADLINE_S) == 75
    assert runs.status(run_dir)["message"].startswith("stopped: the job ends at ")
    commits = len(runs.records(run_dir))
    assert has("commit", 0, "sft")(runs.records(run_dir))
    done = runs.rloop("train", "experiment=tiny", f"run.dir={run_dir}", f"cluster.job_end={time.time() + 60}")
    assert done.returncode == 75
    assert "less than cluster.stop_margin_s=120" in done.stderr
    assert runs.status(run_dir)["message"].startswith("not started: the job ends at ")
    assert [r["event"] for r in runs.records(run_dir)[commits:]] == ["changed"]


@pytest.mark.parametrize("session", ["the terminal's", "another"])
def test_a_run_whose_terminal_is_gone_checkpoints(session: str, tmp_path: Path) -> None:
    """The first is told so, by SIGHUP; the other goes on, and is told to stop later."""
    run_dir = tmp_path / "run"
    terminal, end = os.openpty()
    heeds = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL)"  # though the tests are under nohup
    program = f"{heeds}; os.setsid(); os.open(os.ttyname(0), os.O_RDWR); os.execv(sys.argv[1], sys.argv[1:])"
    begins = [sys.executable, "-c", program] if session == "the terminal's" else []
    process = subprocess.Popen(
        [*begins, *runs.command("train", "experiment=tiny", f"run.dir={run_dir}")],
        **dict.fromkeys(("stdin", "stdout", "stderr"), end),
        cwd=runs.ROOT,
        env=runs.environment(),
    )
    os.close(end)
    runs.wait_for("the first update", lambda: has("commit", 0, "sft", 1)(runs.records(run_dir)), process)
    os.close(terminal)
    if session == "another":
        runs.wait_for("the fifth", lambda: has("commit", 0, "sft", 5)(runs.records(run_dir)), process)
        process.send_signal(signal.SIGTERM)
    assert process.wait(runs.DEADLINE_S) == 75
    name = "SIGTERM" if session == "another" else "SIGHUP"
    assert runs.status(run_dir)["message"] == f"stopped: {name} came; the same command goes on from here"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 40 MiB: a tiny run takes 12."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(path: Path) -> None:
    """Take what space there is."""
    with suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


@pytest.mark.timeout(600)
def test_a_run_waits_for_a_full_disk_and_goes_on(undisturbed: Path, small_disk: Path) -> None:
    run_dir, filler = small_disk / "run", small_disk / "filler"
    process = runs.start(run_dir)
    runs.wait_for("the first RL step", lambda: has("commit", 0, "explore", 1)(runs.records(run_dir)), process)
    fill(filler)
    time.sleep(10.0)
    step = len(runs.records(run_dir))
    time.sleep(5.0)
    assert process.poll() is None
    assert len(runs.records(run_dir)) == step, "the run goes on without space"
    filler.unlink()
    runs.finish(process, run_dir)
    assert "no space for" in (run_dir / "ranks.log").read_text() + Path(f"{run_dir}.log").read_text()
    found, expected = runs.status(run_dir), runs.status(undisturbed)
    for key in ("state", "policy_digest", "base_digest", "cache", "expert"):
        assert found[key] == expected[key], key
    assert metrics_places(run_dir) == metrics_places(undisturbed)


@pytest.mark.timeout(900)
def test_a_run_that_hangs_leaves_its_stacks_and_one_that_dies_three_times_is_let_be(tmp_path: Path) -> None:
    run_dir = tmp_path / "hanging"
    process = runs.start(run_dir, "guard.stall_floor_s=8", "guard.stall_factor=2")
    runs.wait_for("the fifth update", lambda: has("commit", 0, "sft", 5)(runs.records(run_dir)), process)
    everyone = psutil.Process(process.pid).children(recursive=True)
    runs.tree(process)["rank"].send_signal(signal.SIGSTOP)
    assert process.wait(runs.DEADLINE_S) == 75
    _, alive = psutil.wait_procs(everyone, timeout=60)
    assert not alive
    state = runs.status(run_dir)
    assert state["state"] == "interrupted"
    assert state["message"].startswith("stalled: nothing has got done for ")
    (folder,) = (run_dir / "stalls").iterdir()
    assert "rank-0.txt" in [file.name for file in folder.iterdir()], state["message"]
    rank = folder / "rank-0.txt"
    assert "stopped: " in rank.read_text().splitlines()[0]
    assert "rloop_mcore/main/worker.py" in rank.read_text()
    (engine,) = folder.glob("engine-*.txt")
    assert "rollout/embedded/__main__.py" in engine.read_text()

    for _ in range(3):
        process = runs.start(run_dir)
        runs.wait_for("torchrun", partial(is_there, process, "torchrun"), process)
        runs.kill(process, "torchrun")
        assert process.wait(runs.DEADLINE_S) == 1
    assert "it has ended so 3 times in a row after iteration 0 sft" in runs.status(run_dir)["message"]
    refused = runs.rloop("train", "experiment=tiny", f"run.dir={run_dir}")
    assert refused.returncode == 2
    assert "ended 3 times in a row after iteration 0 sft" in refused.stderr
    updates = max(r["step"] for r in runs.records(run_dir) if r["event"] == "commit")
    process = runs.start(run_dir, "--force")
    runs.wait_for("another update", lambda: has("commit", 0, "sft", updates + 1)(runs.records(run_dir)), process)
    runs.kill(process, "all")


def is_there(process: subprocess.Popen[bytes], role: str) -> bool:
    return role in runs.tree(process)


def test_another_configuration_is_refused(undisturbed: Path) -> None:
    other = runs.rloop("train", "experiment=tiny", f"run.dir={undisturbed}", "algorithm.group_size=4")
    assert other.returncode == 2
    assert "algorithm.group_size=16, not 4: the success rates of a phase would mix" in other.stderr
