"""When a run is taken to have stalled, and what its processes say then."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools" / "bench"))

from simulated_fleet import SimulatedFleet, make_requests, run_virtually

from rloop_mcore.compose import load_config
from rloop_mcore.config import RewardConfig, TrackingConfig
from rloop_mcore.errors import Fault
from rloop_mcore.main import run_directory, train
from rloop_mcore.main.run_directory import RunDirectory
from rloop_mcore.main.stacks import collect
from rloop_mcore.main.watchdog import Watchdog, step_seconds
from rloop_mcore.platform import heartbeat
from rloop_mcore.reward.pool import RewardPool
from rloop_mcore.space import Space
from rloop_mcore.timeline import Timeline
from rloop_mcore.tracking import Tracker
from rloop_mcore.types import Problem, Sampling


class Clock:
    def __init__(self) -> None:
        self.now = 500.0

    def __call__(self) -> float:
        return self.now


def watch(folder: Path, *overrides: str) -> tuple[Watchdog, Clock]:
    given = ["model.path=m", "data.train=d", f"run.dir={folder}", "rollout.start_timeout_s=300"]
    clock = Clock()
    return Watchdog(RunDirectory(folder), load_config([*given, *overrides]), clock), clock


def silent_for(watchdog: Watchdog, clock: Clock, seconds: int) -> str | None:
    """What the watchdog says at the end of a silence in which it looked every second."""
    said = None
    for _ in range(seconds):
        clock.now += 1.0
        said = watchdog.look()
    return said


def beat(folder: Path) -> None:
    stat = (folder / "heartbeat").stat()
    os.utime(folder / "heartbeat", ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


def log_steps(folder: Path, *rows: tuple[str, int, float], resumed: int = 1) -> None:
    """Lines of metrics.jsonl: phase, step, time. resumed: the first step that a second start has made."""
    lines = [
        {"iteration": 0, "phase": p, "step": s, "total": 0 if p == "evaluate" else 9, "time": t}
        | {"eta_s": None if s in (1, resumed) else 1.0}
        for p, s, t in rows
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')


def test_the_floor_counts_until_steps_are_known_and_the_start_may_take_longer(tmp_path: Path) -> None:
    watchdog, clock = watch(tmp_path, "guard.stall_floor_s=60")
    assert silent_for(watchdog, clock, 360) is None  # the engines may still be starting
    assert silent_for(watchdog, clock, 1) == "stalled: nothing has got done for 361 s"
    watchdog, clock = watch(tmp_path, "guard.stall_floor_s=60")
    beat(tmp_path)
    assert silent_for(watchdog, clock, 60) is None
    beat(tmp_path)
    assert silent_for(watchdog, clock, 61) is None
    assert silent_for(watchdog, clock, 1) == "stalled: nothing has got done for 61 s"


def test_long_steps_are_given_their_multiple(tmp_path: Path) -> None:
    log_steps(tmp_path, ("explore", 1, 100.0), ("explore", 2, 140.0), ("evaluate", 2, 150.0), ("explore", 3, 180.0))
    watchdog, clock = watch(tmp_path, "guard.stall_floor_s=60", "guard.stall_factor=5")
    beat(tmp_path)
    assert silent_for(watchdog, clock, 201) is None
    assert silent_for(watchdog, clock, 1) == "stalled: nothing has got done for 201 s (a step takes 40.0 s)"


def test_the_steps_of_another_phase_say_nothing(tmp_path: Path) -> None:
    log_steps(tmp_path, ("sft", 1, 0.0), ("sft", 2, 900.0), ("explore", 1, 1000.0))
    assert step_seconds(tmp_path / "metrics.jsonl") is None
    log_steps(tmp_path, ("explore", 1, 0.0), ("explore", 2, 7.0), ("explore", 2, 5000.0), ("explore", 3, 5009.0))
    assert step_seconds(tmp_path / "metrics.jsonl") == 8.0  # what a resume repeats is no step
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("{}\n3\n")
    assert step_seconds(tmp_path / "metrics.jsonl") is None, "damage is for others to tell"
    assert step_seconds(tmp_path / "none.jsonl") is None


def test_the_time_between_two_starts_is_of_no_step(tmp_path: Path) -> None:
    """A run that goes on after a week would be let hang for five."""
    rows = ("explore", 1, 100.0), ("explore", 2, 140.0), ("explore", 3, 600_000.0), ("explore", 4, 600_040.0)
    log_steps(tmp_path, *rows[1:], resumed=3)
    assert step_seconds(tmp_path / "metrics.jsonl") == 40.0
    log_steps(tmp_path, *rows[1:3], resumed=3)
    assert step_seconds(tmp_path / "metrics.jsonl") is None


def test_time_in_which_everything_was_stopped_does_not_count(tmp_path: Path) -> None:
    watchdog, clock = watch(tmp_path, "guard.stall_floor_s=60")
    beat(tmp_path)
    assert silent_for(watchdog, clock, 50) is None
    clock.now += 3600.0  # Slurm suspends a job so
    assert watchdog.look() is None
    assert silent_for(watchdog, clock, 10) is not None


def test_why_a_stalled_run_ends_stands_there_before_its_ranks_fall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank of another node, which loses them then, looks whether something stands there before it says so."""
    run, seen = RunDirectory(tmp_path), []
    write, watchdog = run_directory.write_atomic, watch(tmp_path)[0]
    monkeypatch.setattr(train, "_LOOK_S", 0.05)
    monkeypatch.setattr(watchdog, "look", lambda: "stalled")
    monkeypatch.setattr(run_directory, "write_atomic", lambda *file: (time.sleep(0.5), write(*file)))  # a slow disk
    with subprocess.Popen(["sleep", "60"]) as ranks:
        fallen = os.pidfd_open(ranks.pid)

        def rank_elsewhere() -> None:
            select.select([fallen], [], [])  # whoever reaps the process
            os.close(fallen)
            seen.append(run.ending())

        other = threading.Thread(target=rank_elsewhere)
        other.start()
        assert train._watch(run, ranks, None, watchdog, None, 1) == -9
        other.join(20)
    assert [ending["code"] for ending in seen if ending] == [75]


def away(*_: object) -> None:
    raise OSError(errno.ESTALE, "Stale file handle")


def test_a_file_server_that_is_away_ends_no_supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says so when the ranks have ended; meanwhile they are watched as ever."""
    run, config = RunDirectory(tmp_path), load_config(["experiment=tiny"])
    monkeypatch.setattr(train, "_LOOK_S", 0.05)
    monkeypatch.setattr(RunDirectory, "ending", away)
    monkeypatch.setattr(train, "start_ranks", lambda *_: subprocess.Popen(["sh", "-c", "sleep 0.5; exit 3"]))
    with pytest.raises(Fault, match=rf"the ranks ended with exit code 3, and {tmp_path} can't be read or written any"):
        train._supervise(run, config, None)
    watchdog, clock = watch(tmp_path, "guard.stall_floor_s=60")
    beat(tmp_path)
    assert silent_for(watchdog, clock, 1) is None
    (tmp_path / "heartbeat").unlink()
    (tmp_path / "heartbeat").symlink_to("heartbeat")  # no stat of it, not for the want of it
    assert silent_for(watchdog, clock, 62) == "stalled: nothing has got done for 61 s"


def test_ranks_whose_stacks_cannot_be_kept_are_killed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watchdog = watch(tmp_path)[0]
    monkeypatch.setattr(train, "_LOOK_S", 0.05)
    monkeypatch.setattr(watchdog, "look", lambda: "stalled")
    monkeypatch.setattr(RunDirectory, "write_ending", away)
    with subprocess.Popen(["sleep", "60"]) as ranks:
        assert train._watch(RunDirectory(tmp_path), ranks, None, watchdog, None, 1) == -9


def test_torchrun_that_waits_for_a_node_that_has_gone_does_not_hold_up_a_good_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own patience is 300 s."""
    run, watchdog = RunDirectory(tmp_path), watch(tmp_path)[0]
    monkeypatch.setattr(train, "_LOOK_S", 0.05)
    monkeypatch.setattr(train, "_GRACE_S", 0.2)
    run.write_ending(0, "")
    with subprocess.Popen(["sleep", "20"]) as ranks:
        assert train._watch(run, ranks, None, watchdog, None, 2) == -9
    assert run.ending() == {"code": 0, "message": ""}


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    watchdog, clock = watch(tmp_path, "guard.stall_floor_s=1", "guard.stall_factor=0")
    beat(tmp_path)
    assert silent_for(watchdog, clock, 10000) is None


@pytest.fixture
def beating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A heartbeat of this process, of the year 1970 until something gets done."""
    path = tmp_path / "heartbeat"
    path.touch()
    os.utime(path, (0, 0))
    monkeypatch.setattr(heartbeat, "_EVERY_S", 0.0)
    heartbeat.start(path)
    yield path
    heartbeat.start(None)


def test_waiting_for_a_full_disk_is_no_stall(beating: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def sleep(seconds: float) -> None:
        seen.append(beating.stat().st_mtime)
        os.utime(beating, (0, 0))

    monkeypatch.setattr("rloop_mcore.space.time.sleep", sleep)
    space = Space(beating.parent, lambda text: None, lambda: len(seen) > 3, 3600.0)
    with pytest.raises(Exception, match="no space"):
        space.write("it", lambda: None, needed=2**60)
    assert len(seen) > 3
    assert all(seen)


def span(folder: Path) -> None:
    with Timeline(folder).span("trainer", "sync"):
        pass


def update(folder: Path) -> None:
    Tracker(folder, TrackingConfig(tensorboard=False, progress=False)).log(0, "sft", 1, 0, {}, total=9)


def verdict(folder: Path) -> None:
    with RewardPool(RewardConfig(verifier="countdown", workers=1)) as pool:
        pool.grade([(Problem("a", "", "24", meta={"numbers": [4, 6], "target": 24}), "no answer", False)])


def sample(folder: Path) -> None:
    """The first of two calls that one engine gets one after the other: not only a whole batch counts."""

    async def work() -> None:
        async with SimulatedFleet(1, limit=4) as fleet:
            requests = make_requests(groups=2, size=4)
            both = asyncio.ensure_future(fleet.controller.generate(requests, Sampling(max_tokens=2048)))
            while not (folder / "heartbeat").stat().st_mtime:
                assert not both.done()
                await asyncio.sleep(1.0)
            assert not both.done()
            await both

    run_virtually(work())


@pytest.mark.parametrize("work", [span, update, verdict, sample])
def test_whatever_gets_done_is_a_sign_of_life(beating: Path, work: Callable[[Path], None]) -> None:
    work(beating.parent)
    assert beating.stat().st_mtime > 0


HANGS = """
import sys, time
from rloop_mcore.platform.process import show_stacks_when_asked
show_stacks_when_asked()
def where_it_hangs():
    print("there", flush=True)
    time.sleep(600)
where_it_hangs()
"""


# As if something kept the interpreter's lock: the thread that shows the stacks does not come to it.
HELD = "from rloop_mcore.platform import process\nprocess._show_stacks = lambda *_: None\n"


@contextmanager
def there(program: str) -> Iterator[subprocess.Popen[str]]:
    """The process, where it hangs."""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def hanging() -> Iterator[subprocess.Popen[str]]:
    with there(HANGS) as process:
        yield process


@pytest.mark.parametrize("stopped", [False, True])
def test_a_process_shows_where_it_hangs(hanging: subprocess.Popen[str], tmp_path: Path, stopped: bool) -> None:
    if stopped:
        os.kill(hanging.pid, signal.SIGSTOP)
        while psutil.Process(hanging.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
    for asked in range(2):  # the second time it goes on
        names = collect([psutil.Process(hanging.pid)], tmp_path)
        assert names == [f"other-{hanging.pid}.txt"]
        text = (tmp_path / names[0]).read_text()
        assert text.startswith(f"pid {hanging.pid}, ")
        assert ("stopped" in text.splitlines()[0]) == (stopped and not asked)
        assert text.count("in where_it_hangs") == 1
    assert hanging.poll() is None


BUSY = """
import asyncio, threading
async def deep(n):
    await (deep(n - 1) if n else asyncio.sleep(0))
async def busy():
    while True:
        await asyncio.gather(*(deep(20) for _ in range(20)))
threading.Thread(target=lambda: asyncio.run(busy()), daemon=True).start()
"""


def test_a_process_whose_other_threads_are_at_work_survives_to_show_its_stacks(tmp_path: Path) -> None:
    """faulthandler's walk over the frames of threads that run ended it in three cases of ten."""
    with there(BUSY + HANGS) as process:
        for _ in range(15):
            (name,) = collect([psutil.Process(process.pid)], tmp_path)
            text = (tmp_path / name).read_text()
            assert "in where_it_hangs" in text
            assert "in run_forever" in text
        assert process.poll() is None


def test_a_process_that_keeps_the_interpreters_lock_is_asked_by_a_signal(tmp_path: Path) -> None:
    holds = "import ctypes\nsleep = ctypes.PyDLL(None).sleep\n"  # PyDLL: without giving the lock back
    program = HANGS.replace("time.sleep(600)", "sleep(600)")
    with there(holds + program) as process:
        (name,) = collect([psutil.Process(process.pid)], tmp_path)
    assert "in where_it_hangs" in (tmp_path / name).read_text()


def test_of_a_process_that_does_not_answer_the_kernel_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rloop_mcore.main.stacks._ANSWER_S", 0.5)
    monkeypatch.setattr("rloop_mcore.main.stacks._BY_SIGNAL_S", 0.1)
    blocked = f"{HELD}from rloop_mcore.platform.process import STACKS_SIGNAL\nimport signal\n"
    blocked += "signal.pthread_sigmask(signal.SIG_BLOCK, [STACKS_SIGNAL])\n"
    with there(blocked + HANGS) as process:
        (name,) = collect([psutil.Process(process.pid)], tmp_path)
    text = (tmp_path / name).read_text()
    assert text.startswith(f"pid {process.pid}, ")
    assert text.endswith("\nno answer within 0.5 s\n")


def answering(does: str) -> str:
    """A program that hangs and, asked for its stacks, does this instead; `file` is where they would go."""
    return (
        f"{HELD}import faulthandler, os, signal, time\nfrom rloop_mcore.platform.process import STACKS_SIGNAL\n"
        "faulthandler.register = lambda *args, file, **kwargs: signal.signal(\n"
        f"    STACKS_SIGNAL, lambda *_: ({does}))\n{HANGS}"
    )


def test_what_a_process_wrote_before_it_ended_is_kept(tmp_path: Path) -> None:
    with there(answering("os.write(file, b'my last words'), os._exit(1)")) as process:
        (name,) = collect([psutil.Process(process.pid)], tmp_path)
        assert process.wait(60) == 1
    assert (tmp_path / name).read_text().endswith("my last words")


def test_a_process_that_pauses_within_a_line_is_not_done(tmp_path: Path) -> None:
    """As on a machine that has other work: it was taken for an answer, and the last stacks were missing."""
    with there(
        answering("os.write(file, b'the first '), time.sleep(1.0), os.write(file, b'and the last\\n')")
    ) as process:
        (name,) = collect([psutil.Process(process.pid)], tmp_path)
    assert (tmp_path / name).read_text().endswith("the first and the last\n")


def test_a_process_that_has_ended_meanwhile_is_passed_over(hanging: subprocess.Popen[str], tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    gone = psutil.Process(ended.pid)
    ended.communicate(b"\n")
    assert len(collect([gone, psutil.Process(hanging.pid)], tmp_path / "stacks")) == 1


def test_a_process_that_can_not_be_asked_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with subprocess.Popen(["sleep", "600"]) as process:
        assert collect([psutil.Process(process.pid)], tmp_path) == []
        assert process.poll() is None
        process.kill()
