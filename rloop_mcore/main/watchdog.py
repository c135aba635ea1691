"""A run that gets no further is noticed, its stacks are kept, and it ends so that a scheduler starts it again."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import median

import psutil

from rloop_mcore.config import Config
from rloop_mcore.errors import UserError
from rloop_mcore.main.job_folder import JobFolder
from rloop_mcore.main.run_directory import RunDirectory
from rloop_mcore.main.stacks import collect
from rloop_mcore.platform.files import read_json_lines

STALLED = "stalled"  # an ending begins so

_LAST_STEPS = 50  # the median is of these
_OTHERS_S = 60.0  # for the other nodes to keep their stacks
_LONGEST_LOOK_S = 5.0  # between two looks: more is time in which nobody ran, the run as little as the watchdog


class Watchdog:
    """Asked every second or so; `limit_s` says for how long nothing may happen.

    What counts is the heartbeat, which every piece of work moves: a sample, a verdict, an update, a wait for a full
    disk. Time in which the watchdog itself was stopped does not count.
    """

    def __init__(self, run: RunDirectory, config: Config, clock: Callable[[], float] = time.monotonic) -> None:
        self._run, self._config, self._clock = run, config, clock
        run.heartbeat.touch()
        self._seen, self._looked, self._silent_s, self._begun = self._beat(), clock(), 0.0, False

    def look(self) -> str | None:
        """In words, why the run has stalled; None while it gets on."""
        now, seen = self._clock(), self._beat()
        self._silent_s += min(now - self._looked, _LONGEST_LOOK_S)
        self._looked = now
        if seen != self._seen:
            self._seen, self._silent_s, self._begun = seen, 0.0, True
        guard = self._config.guard
        if not guard.stall_factor or self._silent_s <= guard.stall_floor_s or self._silent_s <= self.limit_s():
            return None
        step_s = step_seconds(self._run.path / "metrics.jsonl")
        usual = f" (a step takes {step_s:.1f} s)" if step_s else ""
        return f"{STALLED}: nothing has got done for {self._silent_s:.0f} s{usual}"

    def limit_s(self) -> float:
        """Seconds; until the first sign of life the engines may be starting, which has a deadline of its own."""
        guard, starting_s = self._config.guard, 0.0 if self._begun else self._config.rollout.start_timeout_s
        step_s = step_seconds(self._run.path / "metrics.jsonl") or 0.0
        return max(guard.stall_floor_s, guard.stall_factor * step_s) + starting_s

    def _beat(self) -> int:
        try:
            return self._run.heartbeat.stat().st_mtime_ns
        except OSError:  # of a run directory that is gone, or on a file server that is away
            return 0


def step_seconds(metrics: Path) -> float | None:
    """Median seconds between the last steps of the phase that is under way; None where there are not two."""
    try:
        steps = [line for line in read_json_lines(metrics) if line.get("total")]
    except (OSError, UserError):  # of a file server that is away, or of damage: not what a watchdog ends by
        return None
    gaps = [
        after["time"] - before["time"]
        for before, after in pairwise(steps)
        if after["phase"] == before["phase"] == steps[-1]["phase"]
        and after["step"] == before["step"] + 1
        and after["eta_s"] is not None  # the first of a start, before which the run stood still, has none
    ]
    return median(gaps[-_LAST_STEPS:]) if gaps else None


def keep_all_stacks(run: RunDirectory, job: JobFolder | None, nodes: int) -> str:
    """Write the stacks of the run's processes, on the other nodes of the job too; returns, in words, where they are."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    kept = [keep_stacks(run, stamp)]
    if job is not None and nodes > 1:
        job.ask_for_stacks(stamp)
        kept += job.wait_for_stacks(nodes, _OTHERS_S)
    return ", ".join(kept)


def kill_children() -> None:
    """This process's, and theirs."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            process.kill()


def keep_stacks(run: RunDirectory, stamp: str) -> str:
    """Write the stacks of this process's children, and theirs; returns, in words, where they are."""
    folder = run.path / "stalls" / f"{stamp}-{socket.gethostname()}"
    try:
        names = collect(psutil.Process().children(recursive=True), folder)
    except OSError as error:  # a full disk, say
        return f"the stacks of {socket.gethostname()} could not be written ({error.strerror})"
    return f"the stacks of {', '.join(names) or 'none of its processes'} are in {folder}"
