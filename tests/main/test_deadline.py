"""A run leaves before its job's end: when it must, by which clock, and what it says."""

from __future__ import annotations

import errno
import time
from datetime import datetime
from pathlib import Path

import pytest

from rloop_mcore.config import ClusterConfig
from rloop_mcore.errors import UserError
from rloop_mcore.main.deadline import Deadline, check_job_end, job_end, stop_requests
from rloop_mcore.main.run_directory import RunDirectory


class Clock:
    def __init__(self) -> None:
        self.now = 500.0

    def __call__(self) -> float:
        return self.now


def asked_after(deadline: Deadline, clock: Clock, *seconds: float) -> list[bool]:
    """What it says when it is asked after so many seconds, each counted from the one before."""
    answers = []
    for wait in seconds:
        clock.now += wait
        answers.append(deadline.near())
    return answers


def test_the_longest_step_so_far_and_the_margin_must_fit() -> None:
    clock = Clock()
    deadline = Deadline(left_s=100, margin_s=20, clock=clock)
    # asked at 10, 40, 50 and 51 s: 50 + 30 is just in time for 80, 51 + 30 is not
    assert asked_after(deadline, clock, 10, 30, 10, 1) == [False, False, False, True]


def test_a_short_step_does_not_make_the_next_one_short() -> None:
    clock = Clock()
    deadline = Deadline(left_s=100, margin_s=0, clock=clock)
    assert asked_after(deadline, clock, 1, 40, 1, 1, 20) == [False, False, False, False, True]


def test_the_first_step_counts_too() -> None:
    clock = Clock()
    assert asked_after(Deadline(100, 20, clock), clock, 39.9) == [False]
    assert asked_after(Deadline(100, 20, clock), clock, 40.1) == [True]


@pytest.mark.parametrize("text", ["1795737000", "1795737000.0", datetime.fromtimestamp(1795737000).isoformat()])
def test_an_end_is_unix_seconds_or_an_iso_time(text: str) -> None:
    assert job_end(ClusterConfig(job_end=text)) == 1795737000


def test_an_iso_time_may_name_its_zone() -> None:
    assert job_end(ClusterConfig(job_end="1970-01-02T01:00:00+01:00")) == 86400


def test_slurm_says_the_end_where_the_configuration_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert job_end(ClusterConfig()) is None
    later = int(time.time()) + 1000
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(later))
    assert job_end(ClusterConfig()) == later
    assert job_end(ClusterConfig(job_end="86400")) == 86400


def test_an_end_that_has_passed_is_refused_from_the_user_and_no_end_from_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", "86400")
    assert job_end(ClusterConfig()) is None
    check_job_end(ClusterConfig())
    with pytest.raises(UserError, match="job_end=1970-01-02 has passed"):
        check_job_end(ClusterConfig(job_end="1970-01-02"))


def test_what_is_no_time_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("tomorrow", "nan", "inf", "1e30", "1764000000000000000"):  # the last: nanoseconds
        with pytest.raises(UserError, match=f"job_end={text} is no time: write"):
            check_job_end(ClusterConfig(job_end=text))
    monkeypatch.setenv("SLURM_JOB_END_TIME", "soon")
    with pytest.raises(UserError, match="SLURM_JOB_END_TIME=soon is no time"):
        check_job_end(ClusterConfig())


def test_a_run_is_told_to_stop_and_why(tmp_path: Path) -> None:
    run, end = RunDirectory(tmp_path), time.time() + 100
    assert not stop_requests(ClusterConfig(job_end=str(end), stop_margin_s=50), run)()
    assert not run.stop_requested()
    assert stop_requests(ClusterConfig(job_end=str(end), stop_margin_s=150), run)()
    assert run.stop_reason() == f"the job ends at {datetime.fromtimestamp(end):%Y-%m-%d %H:%M:%S}"


def test_a_run_that_cannot_keep_why_it_stops_stops_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_file_can_be_made(run: RunDirectory, why: str) -> None:
        raise OSError(errno.ENOSPC, why)

    monkeypatch.setattr(RunDirectory, "request_stop", no_file_can_be_made)
    run = RunDirectory(tmp_path)
    assert stop_requests(ClusterConfig(job_end=str(time.time() + 1), stop_margin_s=50), run)()
    assert run.stop_reason() == "it was to stop"


def test_who_asked_first_is_the_reason(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.request_stop("SIGTERM came")
    assert stop_requests(ClusterConfig(job_end=str(time.time() + 1), stop_margin_s=50), run)()
    assert run.stop_reason() == "SIGTERM came"


def test_a_clock_that_is_set_later_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    must_stop = stop_requests(ClusterConfig(job_end=str(time.time() + 1000), stop_margin_s=0), RunDirectory(tmp_path))
    monkeypatch.setattr(time, "time", lambda: 4e9)
    assert not must_stop()


def test_the_warning_of_a_slurm_job_is_a_file_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLOOP_JOB_FOLDER", str(tmp_path / "slurm/7.0"))
    (tmp_path / "slurm/7.0").mkdir(parents=True)
    run = RunDirectory(tmp_path)
    must_stop = stop_requests(ClusterConfig(), run)
    assert not must_stop()
    (tmp_path / "slurm/7.0/stop").touch()
    assert must_stop()
    assert run.stop_reason() == "Slurm warned the job"
