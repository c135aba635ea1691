"""How the nodes of a job find each other, and whose failure brought it down."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

from rloop_mcore.compose import load_config
from rloop_mcore.errors import Fault, UserError
from rloop_mcore.main.head import explain
from rloop_mcore.main.job_folder import Head, JobFolder, head_address
from rloop_mcore.main.node import node
from rloop_mcore.main.ranks import SCHEDULERS, Rendezvous, first_failure
from rloop_mcore.main.run_directory import RunDirectory
from rloop_mcore.main.train import _supervise
from rloop_mcore.platform.network import addresses

BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()

TORCHRUN = """\
E1127 03:12:11 torch/distributed/elastic/multiprocessing/api.py:882] failed (exitcode: -9) local_rank: 1 (pid: 77)
Failures:
  <NO_OTHER_FAILURES>
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-27_03:12:11
  host      : n1
  rank      : 5 (local_rank: 1)
  exitcode  : -9 (pid: 77)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 77
"""


def test_the_others_learn_where_the_first_node_is(tmp_path: Path) -> None:
    job, found = JobFolder(tmp_path), []
    follower = threading.Thread(target=lambda: found.append(job.wait_for_head(20)))
    follower.start()
    time.sleep(0.2)
    job.publish_head(Head("10.0.0.1", 4711))
    follower.join(20)
    assert found == [Head("10.0.0.1", 4711)]


def test_a_first_node_that_ends_releases_the_others(tmp_path: Path) -> None:
    JobFolder(tmp_path).end(2)
    assert JobFolder(tmp_path).wait_for_head(20) is None


def test_a_node_that_was_cut_off_says_nothing_of_a_later_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, word = RunDirectory(tmp_path), "node 1: the connection was lost"
    for later in ("slurm/7.1", None):  # without: it was not a job that went on
        monkeypatch.delenv("RLOOP_JOB_FOLDER", raising=False)
        if later is not None:
            monkeypatch.setenv("RLOOP_JOB_FOLDER", later)
        with run.lock():
            monkeypatch.setenv("RLOOP_JOB_FOLDER", "slurm/7.0")
            run.write_ending(1, word)
            assert run.ending() is None
    monkeypatch.setenv("RLOOP_JOB_FOLDER", "slurm/7.0")
    with run.lock():
        run.write_ending(1, word)
    assert run.ending() == {"code": 1, "message": word}


def test_nodes_that_do_not_come_are_named(tmp_path: Path) -> None:
    job = JobFolder(tmp_path)
    job.hello(1)
    with pytest.raises(Fault, match=r"waited 0\.3 s \(cluster\.start_timeout_s\) for nodes 2, 3 of 0 to 3"):
        job.wait_for_nodes(4, 0.3)
    job.hello(2)
    job.hello(3)
    assert [other["boot"] for other in job.wait_for_nodes(4, 20)] == [BOOT] * 3


def test_a_run_whose_nodes_do_not_come_says_why_it_failed(tmp_path: Path) -> None:
    words = ["experiment=tiny", f"run.dir={tmp_path}", "cluster.nodes=2", "layout.dp=2", "rollout.engines=2"]
    run = RunDirectory(tmp_path)
    with pytest.raises(Fault):
        _supervise(run, load_config([*words, "cluster.start_timeout_s=0.2"]), JobFolder(tmp_path))
    ending = run.ending()
    assert ending is not None
    assert (ending["code"], ending["message"][:20]) == (1, "waited 0.2 s (cluste")
    assert (tmp_path / "fault.txt").exists()


def test_a_first_node_without_the_jobs_interface_says_so_in_the_run_too(tmp_path: Path) -> None:
    words = ["experiment=tiny", f"run.dir={tmp_path}", "cluster.nodes=2", "layout.dp=2", "rollout.engines=2"]
    run, job = RunDirectory(tmp_path), JobFolder(tmp_path)
    job.hello(1)
    with pytest.raises(UserError):
        _supervise(run, load_config([*words, "cluster.interface=ib7"]), job)
    ending = run.ending()
    assert ending is not None
    assert (ending["code"], ending["message"][:24]) == (2, "cluster.interface=ib7 ha")


def test_a_node_on_which_alone_something_is_wrong_does_not_keep_that_to_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first node ends the run with what is in its directory, once, before Slurm sees this one's exit code."""
    folder, run = tmp_path / "slurm/7.0", RunDirectory(tmp_path)
    folder.mkdir(parents=True)
    monkeypatch.setenv("RLOOP_JOB_FOLDER", str(folder))
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setattr(JobFolder, "ended", lambda job: run.ending() is not None)
    JobFolder(folder).publish_head(Head("127.0.0.1", 4711))
    before = {number: signal.getsignal(number) for number in SCHEDULERS}
    try:
        for override, words in (
            ("hydra.searchpath=[file:///unmounted]", "hydra.searchpath holds /unmounted"),
            ("cluster.interface=ib7", "cluster.interface=ib7 has no IPv4 address on"),
        ):
            run.clear_ending()
            with pytest.raises(UserError, match=re.escape(words)):
                node(["experiment=tiny", override], force=False)
            ending = run.ending()
            assert ending is not None
            assert ending["code"] == 2
            assert re.match(rf"node 1 \(.*\): {re.escape(words)}", ending["message"])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_only_the_user_can_read_the_key(tmp_path: Path) -> None:
    job = JobFolder(tmp_path)
    job.new_key()
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    before = job.key()
    job.new_key()
    assert len(before) == 64
    assert job.key() != before


def seen(address: str, boot: str = BOOT) -> dict[str, str]:
    return {"head": address, "boot": boot, "host": "n2"}


def test_the_first_node_is_where_the_others_see_it() -> None:
    outside = [address for address, name in addresses().items() if name != "lo"]
    for address in outside:
        assert head_address([seen(address)], None) == address
    assert head_address([seen("127.0.0.1"), seen("127.0.0.1")], None) == "127.0.0.1"  # of this machine, all of them
    if outside:  # a name that leads to loopback on its own node, as Debian's /etc/hosts has it
        assert head_address([seen("127.0.1.1", "another machine")], None) == outside[0]
    assert head_address([seen("10.9.9.9", "another machine")], "lo") == "127.0.0.1"


def test_torchrun_gets_fixed_numbers() -> None:
    options = Rendezvous(2, 1, 3, "127.0.0.1", "10.0.0.1", 4711).options()
    assert options == ["--nnodes", "3", "--rdzv-conf", "rank=1", "--rdzv-endpoint", "10.0.0.1:4711"]
    assert Rendezvous(2).environment() == {"GLOO_SOCKET_IFNAME": "lo"}


def test_torchrun_says_who_fell_first(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert first_failure(log) is None
    log.write_text("nothing of the kind")
    assert first_failure(log) is None
    earlier = TORCHRUN.replace("rank      : 5", "rank      : 4").replace("-9", "1")
    log.write_text(earlier + TORCHRUN)  # of two starts, the last
    found = first_failure(log)
    assert found is not None
    assert (found["rank"], found["code"]) == (5, -9)


def test_the_rank_that_was_killed_is_the_cause_and_not_the_one_that_said_so_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, folder = RunDirectory(tmp_path), tmp_path / "slurm/7.0"
    folder.mkdir(parents=True)
    job = JobFolder(folder)
    run.write_ending(1, "rank 0: RuntimeError: Connection closed by peer", "a traceback")
    job.log("torchrun-0").write_text(TORCHRUN.replace("-9", "1").replace("rank      : 5", "rank      : 0"))
    job.write_failure(1, {"rank": 5, "code": -9})
    job.log("rank-5").write_text("its last words\n")
    explain(run, job, 2)
    assert "its last words" in capsys.readouterr().err
    ending = json.loads((tmp_path / "ending.json").read_text())
    assert ending["code"] == 1
    assert ending["message"].startswith("rank 5 on node 1 (")
    assert ending["message"].endswith("was killed by signal 9")


def test_who_fell_first_does_not_depend_on_the_nodes_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = JobFolder(tmp_path)
    for number, clock in ((2, 9e8), (0, 5e8), (1, 7e8)):  # in this order, each by a clock of its own
        monkeypatch.setattr(time, "time", lambda clock=clock: clock)
        (tmp_path / "torchrun.log").write_text(TORCHRUN.replace("-9", "1").replace("rank      : 5", f"rank : {number}"))
        failure = first_failure(tmp_path / "torchrun.log")
        assert failure is not None
        job.write_failure(number, failure)
        os.utime(tmp_path / f"failed-{number}.json", (0, 10 + (2, 0, 1).index(number)))  # the file system's
    assert [failure["rank"] for failure in job.failures(3)] == [2, 0, 1]
    job.write_failure(1, {"rank": 1, "code": -9})
    assert [failure["rank"] for failure in job.failures(3)] == [1, 2, 0]


def test_a_run_that_was_stopped_needs_no_explanation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(tmp_path)
    run.write_ending(75, "stopped")
    explain(run, JobFolder(tmp_path), 4)
    assert capsys.readouterr().err == ""
