"""The job's end: a run that would be killed then stops at a commit before it, while there is time for one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime

from rloop_mcore.config import ClusterConfig
from rloop_mcore.errors import UserError
from rloop_mcore.main.job_folder import JobFolder
from rloop_mcore.main.run_directory import RunDirectory

_SLURM_VARIABLE = "SLURM_JOB_END_TIME"


class Deadline:
    """Asked once a step whether another one fits before the end, which is `left_s` seconds from now."""

    def __init__(self, left_s: float, margin_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._last_chance = clock, clock() + left_s - margin_s
        self._asked, self._longest = clock(), 0.0

    def near(self) -> bool:
        """Whether a step as long as the longest so far, and the margin after it, would end too late."""
        now = self._clock()
        self._longest = max(self._longest, now - self._asked)
        self._asked = now
        return now + self._longest > self._last_chance


def job_end(cluster: ClusterConfig) -> float | None:
    """When the job ends, in Unix seconds: `cluster.job_end`, else what Slurm says, None where neither says anything.

    Raises UserError for what is no time.
    """
    if cluster.job_end is not None:
        return _unix_seconds("cluster.job_end", cluster.job_end)
    if text := os.environ.get(_SLURM_VARIABLE):
        end = _unix_seconds(_SLURM_VARIABLE, text)
        return end if end > time.time() else None  # the job was given more time after it had started
    return None


def check_job_end(cluster: ClusterConfig) -> None:
    """Raises UserError for a `cluster.job_end` that is no time, or has passed."""
    end = job_end(cluster)
    if cluster.job_end is not None and end is not None and end <= time.time():
        raise UserError(f"cluster.job_end={cluster.job_end} has passed: give the end of the job that starts now.")


def in_words(end: float) -> str:
    """Why a run stops."""
    return f"the job ends at {datetime.fromtimestamp(end):%Y-%m-%d %H:%M:%S}"


def stop_requests(cluster: ClusterConfig, run: RunDirectory) -> Callable[[], bool]:
    """What a run asks once a step: was it told to stop, was its job warned, or must it for the job's end?

    The end is a date only when this is called: clocks that are set later change nothing.
    """
    end, job = job_end(cluster), JobFolder.of_this_job()
    deadline = None if end is None else Deadline(end - time.time(), cluster.stop_margin_s)

    def reason() -> str | None:
        if end is not None and deadline is not None and deadline.near():
            return in_words(end)
        return "Slurm warned the job" if job is not None and job.stop_flag.exists() else None

    def must_stop() -> bool:
        why = reason()
        if why is not None and not run.stop_requested():
            with suppress(OSError):  # of a full disk: it stops all the same, and says less
                run.request_stop(why)
            return True
        return run.stop_requested()

    return must_stop


def _unix_seconds(name: str, text: str) -> float:
    with suppress(ValueError, OverflowError, OSError):  # no number, not a number, or beyond the calendar
        return datetime.fromtimestamp(float(text)).timestamp()
    with suppress(ValueError):
        return datetime.fromisoformat(text).timestamp()
    raise UserError(
        f"{name}={text} is no time: write 2026-11-27T04:00 (local time, unless it ends in Z or +01:00) or Unix seconds."
    )
