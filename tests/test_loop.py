"""Algorithm 1 over scripted rooms, with the real journal, cache and metrics: where phases start, what kills leave."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from rloop_mcore.compose import load_config
from rloop_mcore.config import Config, OptimizerConfig, TrackingConfig
from rloop_mcore.errors import UserError
from rloop_mcore.feed import Feed
from rloop_mcore.journal import Journal
from rloop_mcore.loop import RLoop
from rloop_mcore.platform.files import atomic_path
from rloop_mcore.rl_step import Batch
from rloop_mcore.run_state import Interrupted, RunState
from rloop_mcore.tracking import Tracker
from rloop_mcore.trajectory.cache import TrajectoryCache
from rloop_mcore.trajectory.compact import compact
from rloop_mcore.trajectory.quarantine import quarantine
from rloop_mcore.types import Example, Policy, Trajectory


class Kills:
    """Copies a run directory before every call that changes it: what a kill at that moment leaves."""

    def __init__(self, directory: Path, copies: Path) -> None:
        self.directory, self.copies, self.count = directory, copies, 0

    def before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def copied(*args: Any, **kwargs: Any) -> Any:
            shutil.copytree(self.directory, self.copies / str(self.count))
            self.count += 1
            return call(*args, **kwargs)

        return copied


class NumberActor:
    """The policy is a number: an RL step hashes it with the step, fine-tuning with the examples."""

    def __init__(self) -> None:
        self.number, self.begun = "", list[str]()
        self.saving: tuple[Path, str] | None = None

    def begin(self, policy: Path, optimizer: OptimizerConfig, total_updates: int) -> None:
        self.number = (policy / "number").read_text()
        self.begun.append(policy.name)

    def advance(self, *what: object) -> None:
        self.number = hashlib.sha256(repr((self.number, what)).encode()).hexdigest()

    def fine_tune(self, batch: Sequence[Example], loss: str) -> dict[str, float]:
        self.advance("fine_tune", [example.response_ids for example in batch])
        return {"loss": 1.0}

    def export(self) -> Iterator[tuple[str, Any]]:
        return iter([(self.number, None)])

    def save_policy(self, path: Path) -> Policy:
        return write_policy(path, self.number)

    def start_save(self, path: Path) -> None:
        assert self.saving is None
        self.saving = path, self.number
        unfinished(path).mkdir(parents=True)

    def finish_save(self) -> None:
        assert self.saving is not None
        (path, number), self.saving = self.saving, None
        unfinished(path).rmdir()
        write_policy(path, number)

    def load(self, path: Path) -> None:
        self.number = (path / "number").read_text()


def unfinished(path: Path) -> Path:
    return path.with_name(f".tmp-{path.name}")


def write_policy(path: Path, number: str) -> Policy:
    with atomic_path(path) as temporary:
        temporary.mkdir()
        (temporary / "number").write_text(number)
    return Policy(path, number)


class InstantRollout:
    def wait(self, future: Future[Any], version: int | None = None) -> Any:
        return future.result()

    def cancel(self) -> None:
        pass


class HashStep:
    """An RL step: four trajectories of problem `easy`, all right, and twelve of `hard`, of which `successes` are."""

    def __init__(self, actor: NumberActor, cache: TrajectoryCache, successes: int) -> None:
        self.actor, self.cache, self.successes = actor, cache, successes

    def feed(self, iteration: int, first: int, last: int, position: int) -> Feed[Batch]:
        def collect(step: int) -> Batch:
            return Batch([], [], position + 2 * (step - first + 1), {})

        return Feed(collect, InstantRollout(), first, last, max_lag=0, partial=False)  # type: ignore[arg-type]

    def train(self, iteration: int, step: int, batch: Batch, version: int) -> dict[str, float]:
        outcomes = [("easy", n, True) for n in range(4)] + [("hard", n, n < self.successes) for n in range(12)]
        token = int(self.actor.number[:6], 16)
        self.cache.append(
            [
                Trajectory(
                    iteration, step, problem, n, (1,), (token, n), (-0.5, -0.5), "stop", ((1, 2),), ok, float(ok), ""
                )
                for problem, n, ok in outcomes
            ]
        )
        self.actor.advance("rl", step, batch.position - 2)
        return {"success_rate": 0.5}


class NumberRollout:
    def __init__(self) -> None:
        self.number = ""

    def sleep(self) -> None:
        self.number = ""

    def sync(self, export: Callable[[], Iterator[tuple[str, Any]]], version: int) -> dict[str, float]:
        self.number = next(export())[0]
        return {}


class NumberEvaluator:
    """Records which policy the engines held."""

    def __init__(self, rollout: NumberRollout, directory: Path) -> None:
        self.rollout, self.directory = rollout, directory

    def evaluate(self, name: str, policy: str) -> dict[str, float]:
        with atomic_path(self.directory / "evaluation" / f"{name}.json") as path:
            path.write_text(json.dumps({"policy": policy, "number": self.rollout.number}))
        return {"avg@1": int(self.rollout.number[:4], 16) / 65536}


def configure(*overrides: str) -> Config:
    short = ["algorithm.iterations=2", "algorithm.rl_steps=3", "evaluation.every=2", "rft.batch_size=1"]
    return load_config(["run.dir=r", "model.path=m", "data.train=d", *short, *overrides])


def start(
    directory: Path,
    config: Config,
    kills: Kills | None = None,
    successes: int = 1,
    evaluated: bool = True,
    demonstrations: Sequence[Example] | None = None,
    stop: Callable[[], bool] = lambda: False,
    actor: NumberActor | None = None,
) -> NumberActor:
    """One process of a run: everything is made anew from the directory."""
    directory.mkdir(exist_ok=True)
    base = directory.parent / "base"
    if not base.exists():
        write_policy(base, "ba5e" * 16)
    actor, rollout, journal = actor or NumberActor(), NumberRollout(), Journal(directory / "journal.jsonl")
    cache = TrajectoryCache(directory / "cache")
    evaluator = NumberEvaluator(rollout, directory) if evaluated else None
    tracker = Tracker(directory, TrackingConfig(tensorboard=False, progress=False))
    if kills is not None:
        calls = [(actor, "start_save"), (actor, "finish_save"), (actor, "save_policy"), (cache, "seal")]
        calls += [(journal, "record"), (tracker, "log"), *([] if evaluator is None else [(evaluator, "evaluate")])]
        for owner, name in calls:
            setattr(owner, name, kills.before(getattr(owner, name)))
    state = RunState(config, directory, journal, actor, rollout, cache, evaluator, tracker, stop)  # type: ignore[arg-type]
    try:
        state.recover()
        step = HashStep(actor, cache, successes)
        RLoop(config, state, actor, step).run(Policy(base, "ba5e" * 16), demonstrations)  # type: ignore[arg-type]
    finally:
        tracker.close()
    return actor


def facts(directory: Path) -> dict[str, Any]:
    """What must not depend on kills."""
    cache = TrajectoryCache(directory / "cache")
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return {
        "events": [
            {key: value for key, value in record.items() if key not in ("n", "time", "metrics_offset", "shards")}
            for record in Journal(directory / "journal.jsonl").records
            if record["event"] != "commit"
        ],
        "cache": (cache.count(), cache.digest()),
        "metrics": [(line["iteration"], line["phase"], line["step"]) for line in lines],
        "files": sorted(str(path.relative_to(directory)) for path in directory.rglob("number")),
        "checkpoints": sorted(path.name for path in (directory / "checkpoints").iterdir()),
        "evaluations": {path.name: path.read_text() for path in (directory / "evaluation").glob("*.json")},
    }


def policies(directory: Path) -> list[str]:
    return [r["path"] for r in Journal(directory / "journal.jsonl").records if r["event"] == "policy"]


def test_exploitation_starts_from_the_same_theta_as_exploration(tmp_path: Path) -> None:
    actor = start(tmp_path / "run", configure(), evaluated=False)
    assert actor.begun == ["base", "base", "theta_1", "theta_1"]
    assert policies(tmp_path / "run") == [str(tmp_path / "base"), "policies/theta_1", "policies/theta_2"]


def test_without_the_reset_exploitation_starts_from_the_rl_endpoint(tmp_path: Path) -> None:
    actor = start(tmp_path / "run", configure("algorithm.reset=false"), evaluated=False)
    assert actor.begun == ["base", "i0_explore_000003", "theta_1", "i1_explore_000003"]


def test_without_rft_the_rl_endpoint_is_the_next_theta(tmp_path: Path) -> None:
    actor = start(tmp_path / "run", configure("rft.enabled=false"), evaluated=False)
    assert actor.begun == ["base", "i0_explore_000003"]
    assert policies(tmp_path / "run")[1:] == ["policies/i0_explore_000003", "policies/i1_explore_000003"]


def test_an_empty_expert_set_leaves_theta_and_says_so(tmp_path: Path) -> None:
    start(tmp_path / "run", configure(), successes=0)
    records = [r for r in Journal(tmp_path / "run" / "journal.jsonl").records if r["event"] == "policy"]
    assert {record["path"] for record in records} == {str(tmp_path / "base")}
    assert [record["reason"] for record in records[1:]] == ["no expert trajectory: nothing to fine-tune on"] * 2


def test_each_policy_is_measured_once_by_its_own_weights(tmp_path: Path) -> None:
    start(tmp_path / "run", configure())
    names = [r["name"] for r in Journal(tmp_path / "run" / "journal.jsonl").records if r["event"] == "measured"]
    explored = [f"i{i}_{phase}" for i in (0, 1) for phase in ("explore_000002", "explore_000003", "exploit_000000")]
    assert names == ["base", *explored]
    for path in (tmp_path / "run" / "evaluation").glob("*.json"):
        record = json.loads(path.read_text())
        assert (tmp_path / "run" / record["policy"] / "number").read_text() == record["number"], path.name


DEMONSTRATIONS = [Example((1,), (n,)) for n in range(3)]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_a_kill_before_any_change_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, asynchronous: bool
) -> None:
    config = configure(f"checkpoint.every={every}", f"checkpoint.asynchronous={asynchronous}", "sft.batch_size=1")
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # what a kill leaves, the system keeps: it only costs time here

    whole, copies = tmp_path / "whole", tmp_path / "copies"
    kills = Kills(whole, copies)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", kills.before(shutil.rmtree))
        start(whole, config, kills, demonstrations=DEMONSTRATIONS)
    expected = facts(whole)
    assert kills.count > 80
    for directory in sorted(copies.iterdir()):
        start(directory, config, demonstrations=DEMONSTRATIONS)
        assert facts(directory) == expected, f"kill before change {directory.name}"


def test_an_asynchronous_checkpoint_is_committed_once_it_is_whole(tmp_path: Path) -> None:
    """While SFT's second update is made, the first one's checkpoint is unfinished and the journal silent about it."""
    seen: list[tuple[list[int], list[str]]] = []

    class Watched(NumberActor):
        def fine_tune(self, batch: Sequence[Example], loss: str) -> dict[str, float]:
            commits = [r["step"] for r in Journal(tmp_path / "run" / "journal.jsonl").records if r["event"] == "commit"]
            seen.append((commits, sorted(path.name for path in (tmp_path / "run").glob("checkpoints/*"))))
            return super().fine_tune(batch, loss)

    config = configure("checkpoint.asynchronous=true", "sft.batch_size=1", "rft.enabled=false")
    start(tmp_path / "run", config, demonstrations=DEMONSTRATIONS, actor=Watched())
    assert seen == [
        ([], []),
        ([], [".tmp-i0_sft_000001"]),
        ([1], [".tmp-i0_sft_000002", "i0_sft_000001"]),
    ]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stop_commits_and_the_next_start_goes_on(tmp_path: Path, asynchronous: bool) -> None:
    config = configure("checkpoint.every=3", f"checkpoint.asynchronous={asynchronous}")
    start(tmp_path / "whole", config)
    answers = iter([True])
    with pytest.raises(Interrupted):
        start(tmp_path / "run", config, stop=lambda: next(answers))
    assert Journal(tmp_path / "run" / "journal.jsonl").records[-1]["step"] == 1
    start(tmp_path / "run", config)
    assert facts(tmp_path / "run") == facts(tmp_path / "whole")


def committed(directory: Path) -> list[str]:
    return Journal(directory / "journal.jsonl").shards()


def stopped_in_the_second_iteration(directory: Path) -> None:
    with pytest.raises(Interrupted):
        start(directory, configure(), stop=lambda: len(committed(directory)) == 4)
    assert len(committed(directory)) == 5


def test_a_run_goes_on_in_a_compacted_cache(tmp_path: Path) -> None:
    start(tmp_path / "whole", configure())
    stopped_in_the_second_iteration(tmp_path / "run")
    before, after = compact(tmp_path / "run" / "cache", committed(tmp_path / "run"))
    assert after < before
    start(tmp_path / "run", configure())
    assert facts(tmp_path / "run") == facts(tmp_path / "whole")
    assert committed(tmp_path / "run") == committed(tmp_path / "whole")
    compact(tmp_path / "run" / "cache", committed(tmp_path / "run"))
    start(tmp_path / "run", configure())
    assert facts(tmp_path / "run") == facts(tmp_path / "whole")


def test_a_run_goes_on_without_a_shard_that_was_set_aside(tmp_path: Path) -> None:
    start(tmp_path / "whole", configure())
    stopped_in_the_second_iteration(tmp_path / "run")
    cache = tmp_path / "run" / "cache"
    (cache / committed(tmp_path / "run")[-1]).unlink()
    with pytest.raises(UserError, match="--quarantine"):
        start(tmp_path / "run", configure())
    (lost,) = quarantine(cache)
    start(tmp_path / "run", configure())
    assert committed(tmp_path / "run") == committed(tmp_path / "whole")
    assert TrajectoryCache(cache).count() == TrajectoryCache(tmp_path / "whole" / "cache").count() - lost.rows
    assert [loss.lost for loss in TrajectoryCache(cache).losses()] == [lost.rows]


def test_a_start_makes_the_journal_durable_before_it_removes_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The killed process may not have synced its last commit, and a power cut take it back."""
    start(tmp_path / "run", configure())
    (tmp_path / "run" / "checkpoints" / "i9_explore_000001").mkdir()
    (tmp_path / "run" / "cache" / "shard-000099.parquet").touch()
    events = []
    fsync, unlink, rmtree = os.fsync, os.unlink, shutil.rmtree
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd))
    )
    monkeypatch.setattr(os, "unlink", lambda path: (events.append("removal"), unlink(path)))
    monkeypatch.setattr(shutil, "rmtree", lambda path: (events.append("removal"), rmtree(path)))
    start(tmp_path / "run", configure())
    assert events.count("removal") >= 2
    assert events.index("journal.jsonl") < events.index("removal")


def test_more_checkpoints_may_be_kept_after_a_restart(tmp_path: Path) -> None:
    answers = iter([False, False, True])
    with pytest.raises(Interrupted):
        start(tmp_path / "run", configure(), stop=lambda: next(answers, False))
    start(tmp_path / "run", configure("checkpoint.keep=4"))
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 4


def test_a_checkpoint_removed_by_half_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run dies while it removes a checkpoint, and is started again to keep more of them."""

    def half(path: Path) -> None:
        (path / "number").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", half)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "run", configure())
    monkeypatch.undo()
    answers = iter([False, True])
    with pytest.raises(Interrupted):
        start(tmp_path / "run", configure("checkpoint.keep=4"), stop=lambda: next(answers))
    checkpoints = list((tmp_path / "run" / "checkpoints").iterdir())
    assert len(checkpoints) > 1
    assert all((path / "number").exists() for path in checkpoints)
