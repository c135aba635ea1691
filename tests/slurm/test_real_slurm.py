"""Whole runs as jobs of a real Slurm on fake nodes (`make test-slurm`): whatever happens to a job, the run ends with
the bits of one that nothing happened to, on a single host."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster, install

from rloop_mcore.journal import Journal
from rloop_mcore.main.run_directory import RunDirectory
from rloop_mcore.main.status import read_status

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif("RLOOP_SLURM" not in os.environ, reason="starts a real Slurm as root: make test-slurm"),
]

ROOT = Path(__file__).parents[2]
FORWARDED = "cluster.slurm.environment=[PYTHONPATH,SLURM_CONF,OMP_NUM_THREADS,HF_HUB_OFFLINE]"
DEADLINE_S = 240.0
STEPS = 6


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    install()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the cluster comes down then, too
    cluster = Cluster(tmp_path_factory.mktemp("slurm"), nodes=4)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that solves a few problems."""
    run = tmp_path_factory.mktemp("base") / "run"
    rloop(
        "train",
        "experiment=tiny",
        "algorithm.iterations=0",
        "evaluation.samples=1",
        "evaluation.k=[1]",
        f"run.dir={run}",
    )
    return run / "policies/theta_0"


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, on one host."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    rloop("train", *overrides(base, run))
    return run


def overrides(base: Path, run: Path) -> list[str]:
    """Two ranks and two engines, wherever they are."""
    return [
        *("experiment=tiny", f"model.path={base}", "sft.demonstrations=null", f"run.dir={run}"),
        *("algorithm.iterations=1", f"algorithm.rl_steps={STEPS}", "layout.dp=2", "rollout.engines=2"),
        *(
            "evaluation.every=0",
            "cluster.stop_margin_s=5",
            "cluster.slurm.cpus_per_node=8",
            "cluster.slurm.preflight=false",
        ),
    ]


def rloop(*arguments: str, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "rloop_mcore.main.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        env={**(environment or os.environ), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Job:
    """A submitted run."""

    def __init__(self, slurm: Cluster, base: Path, run: Path, *more: str) -> None:
        self.slurm, self.run = slurm, run
        said = rloop("launch", *overrides(base, run), FORWARDED, *more, environment=slurm.environment)
        self.number = said.split()[2].rstrip(";")

    def shown(self, name: str) -> str:
        """A field of `scontrol show job`, of the first component."""
        line = self.slurm.run("scontrol", "show", "job", self.number, "-o").splitlines()[0]
        return next(word for word in line.split() if word.startswith(f"{name}=")).removeprefix(f"{name}=")

    def state(self) -> str:
        return self.shown("JobState")

    def head(self) -> str:
        """The node of the batch script."""
        return self.shown("BatchHost")

    def minutes(self) -> int:
        """For which the job has run."""
        hours, minutes, _ = self.shown("RunTime").split(":")
        return 60 * int(hours) + int(minutes)

    def restarts(self) -> int:
        return len(list((self.run / "slurm").glob(f"{self.number}.*/"))) - 1

    def folder(self) -> Path:
        return max((self.run / "slurm").glob(f"{self.number}.*/"), key=lambda path: int(path.suffix[1:]))

    def steps(self) -> int:
        """RL steps that are committed."""
        records = Journal(self.run / "journal.jsonl").records
        return max((r["step"] for r in records if r["event"] == "commit" and r["phase"] == "explore"), default=0)

    def wait_for(self, what: str, condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
        deadline = time.monotonic() + deadline_s
        while not condition():
            assert time.monotonic() < deadline, f"waited {deadline_s:g} s for {what}:\n{self.logs()}"
            time.sleep(0.1)

    def wait_for_restart(self, restarts: int) -> None:
        """Wait until the job has been started again so often; without the two minutes that Slurm waits."""

        def begun() -> bool:
            if self.shown("Reason") == "BeginTime":
                self.slurm.run("scontrol", "update", f"JobId={self.number}", "StartTime=now", check=False)
            return self.restarts() >= restarts

        self.wait_for(f"start {restarts + 1}", begun)

    def wait_for_steps(self, steps: int) -> None:
        self.wait_for(f"step {steps}", lambda: self.steps() >= steps)

    def finish(self) -> None:
        self.wait_for("its end", lambda: self.state() not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"))
        assert self.state() == "COMPLETED", self.logs()

    def logs(self) -> str:
        files = sorted((self.run / "slurm").rglob("*.out"))
        return "\n".join(f"== {file}\n{file.read_text()[-3000:]}" for file in files)


def assert_same(run: Path, undisturbed: Path) -> None:
    found, expected = read_status(RunDirectory(run)), read_status(RunDirectory(undisturbed))
    for key in ("state", "policy_digest", "base_digest", "cache", "expert"):
        assert found[key] == expected[key], key
    assert expected["state"] == "finished"
    assert sum(expected["expert"]) > 0, "the comparison needs something to be learnt"
    assert expected["policy_digest"] != expected["base_digest"]
    for each in (run, undisturbed):
        steps = [json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()]
        places = [line["step"] for line in steps if line["phase"] == "explore" and "seconds_update" in line]
        assert places == list(range(1, STEPS + 1)), "a step is missing or counted twice"


def test_two_nodes_that_train_and_generate(slurm: Cluster, base: Path, undisturbed: Path, tmp_path: Path) -> None:
    job = Job(slurm, base, tmp_path / "run", "cluster.nodes=2")
    job.finish()
    assert_same(job.run, undisturbed)
    assert job.restarts() == 0
    names = {path.name for path in job.folder().iterdir()}
    assert {"rank-0.log", "rank-1.log", "engine-0.log", "engine-1.log", "node-0.out", "node-1.out"} <= names
    key = (job.folder() / "key").read_text()
    assert (job.folder() / "key").stat().st_mode & 0o077 == 0
    spoken = [file.read_text(errors="replace") for file in (job.run / "slurm").rglob("*.[lo][ou][gt]")]
    assert spoken
    assert not any(key in text for text in spoken), "the engines' key is in a log"
    if slurm.apart:
        head = json.loads((job.folder() / "head.json").read_text())
        assert not head["address"].startswith("127."), "the nodes have no loopback in common"


def test_an_engine_that_dies_on_its_own_node_comes_back(
    slurm: Cluster, base: Path, undisturbed: Path, tmp_path: Path
) -> None:
    job = Job(slurm, base, tmp_path / "run", "cluster.nodes=4", "rollout.nodes=2")
    job.wait_for_steps(1)
    with stopped(slurm, job.head(), "main.worker"):  # so that the engine is back before the run is over
        for engine in processes(slurm, "n3", "rollout.embedded"):
            os.kill(engine, signal.SIGKILL)
        job.wait_for("the engine", lambda: published(job)["start"] == 2)
    job.finish()
    assert_same(job.run, undisturbed)
    assert job.restarts() == 0
    assert published(job)["start"] == 2
    lines = [json.loads(line) for line in (job.run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "engines_lost" in line][-1]
    assert (last["engines_lost"], last["engines_serving"]) == (1, 2)


def published(job: Job) -> dict[str, Any]:
    return dict(json.loads((job.folder() / "engine-0.json").read_text()))


def processes(slurm: Cluster, node: str, mark: str) -> list[int]:
    """Those on a node whose command line holds `mark`."""
    found = []
    for pid in slurm.processes_of(node):
        with suppress(OSError):
            if mark in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(pid)
    return found


@contextmanager
def stopped(slurm: Cluster, node: str, mark: str) -> Iterator[None]:
    pids = processes(slurm, node, mark)
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    yield
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def test_a_run_that_hangs_leaves_the_stacks_of_all_nodes(
    slurm: Cluster, base: Path, undisturbed: Path, tmp_path: Path
) -> None:
    stall = ("guard.stall_floor_s=20", "guard.stall_factor=2")
    job = Job(slurm, base, tmp_path / "run", "cluster.nodes=4", "rollout.nodes=2", *stall)
    job.wait_for_steps(1)
    (rank,) = processes(slurm, "n2", "-u\0-m\0rloop_mcore.main.worker")
    os.kill(rank, signal.SIGSTOP)
    job.wait_for_restart(1)
    job.finish()
    assert_same(job.run, undisturbed)
    names = [path.name.partition("-")[0] for path in job.run.glob("stalls/*/*.txt")]
    assert names.count("rank") == names.count("engine") == 2, sorted(job.run.glob("stalls/*/*"))


def test_a_node_that_dies_has_the_job_start_again_elsewhere(
    slurm: Cluster, base: Path, undisturbed: Path, tmp_path: Path
) -> None:
    job = Job(slurm, base, tmp_path / "run", "cluster.nodes=2")
    job.wait_for_steps(2)
    slurm.kill_node("n2")
    job.wait_for_restart(1)
    job.finish()
    slurm.start_node("n2")
    assert_same(job.run, undisturbed)
    assert job.restarts() == 1


def test_a_chain_of_jobs_is_one_run(slurm: Cluster, base: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The first start comes near its time limit; the second is warned as Slurm does then."""
    more = ("cluster.nodes=2", "cluster.slurm.time=30", "cluster.slurm.signal_s=120")
    job = Job(slurm, base, tmp_path / "run", *more)
    job.wait_for_steps(1)
    with stopped(slurm, job.head(), "main.worker"):  # the limit comes nearer than the warning
        slurm.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={job.minutes() + 2}")
        job.wait_for("Slurm's warning", (job.folder() / "stop").exists)
    slurm.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=30")
    job.wait_for_restart(1)
    warn_after_a_step(job, slurm, restarts=1)
    job.finish()
    assert job.restarts() >= 2
    assert_same(job.run, undisturbed)
    assert not [r for r in Journal(job.run / "journal.jsonl").records if r["event"] == "changed"]


def warn_after_a_step(job: Job, slurm: Cluster, restarts: int) -> None:
    """Have the job's start after so many restarts commit one more step, warn it, and wait until it starts again."""
    seen = job.steps()
    job.wait_for("another step", lambda: job.steps() > seen or job.restarts() > restarts)
    if job.restarts() == restarts:
        slurm.run("scancel", "--batch", "--signal=USR1", job.number)
    job.wait_for_restart(restarts + 1)


def test_a_heterogeneous_job(slurm: Cluster, base: Path, undisturbed: Path, tmp_path: Path) -> None:
    more = ("cluster.nodes=3", "rollout.nodes=1", "cluster.slurm.hetjob=true")
    job = Job(slurm, base, tmp_path / "run", *more)
    job.finish()
    assert_same(job.run, undisturbed)


def test_a_bad_node_is_named_and_left_out(slurm: Cluster, base: Path, undisturbed: Path, tmp_path: Path) -> None:
    slurm.kill_node("n2")
    slurm.start_node("n2", ailment="mount -t tmpfs -o size=1m tmpfs /dev/shm")
    slurm.wait_until_idle()
    try:
        more = ("cluster.nodes=3", "rollout.nodes=1", "cluster.slurm.preflight=true")
        job = Job(slurm, base, tmp_path / "run", *more, "preflight.tmp_gib=0.1", "preflight.run_gib=0.1")
        job.wait_for_restart(1)
        job.finish()
    finally:
        slurm.kill_node("n2")
        slurm.start_node("n2")
        slurm.wait_until_idle()
    assert job.restarts() == 1
    first = job.run / f"slurm/{job.number}.0"
    assert "n2: " in (first / "preflight-0.out").read_text()
    assert not (first / "node-0.out").exists(), "the run was started on a bad node"
    assert "ExcNodeList=n2" in slurm.run("scontrol", "show", "job", job.number)
    assert_same(job.run, undisturbed)


def test_a_cancelled_job_can_be_resumed(slurm: Cluster, base: Path, undisturbed: Path, tmp_path: Path) -> None:
    job = Job(slurm, base, tmp_path / "run", "cluster.nodes=2")
    job.wait_for_steps(2)
    slurm.run("scancel", job.number)
    job.wait_for("its end", lambda: job.state() == "CANCELLED", 60)
    job.wait_for("its processes' end", lambda: not slurm.run("squeue", "-h"), 60)
    assert read_status(RunDirectory(job.run))["state"] == "interrupted"
    again = Job(slurm, base, tmp_path / "run", "cluster.nodes=2")
    again.finish()
    assert_same(job.run, undisturbed)
