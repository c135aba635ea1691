"""Algorithm 1 over scripted rooms, with the real journal, cache and metrics: where phases start, what kills leave."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.parquet as pq
import pytest

from rloop_mcore import commits, run_state, space
from rloop_mcore.algorithm.rft import batch_indices
from rloop_mcore.algorithm.seeds import derive_seed
from rloop_mcore.compose import load_config
from rloop_mcore.config import Config, OptimizerConfig, TrackingConfig
from rloop_mcore.errors import DiskFull, Fault, Interrupted, UserError
from rloop_mcore.feed import Feed
from rloop_mcore.journal import Journal
from rloop_mcore.loop import RLoop
from rloop_mcore.platform.files import atomic_path
from rloop_mcore.rl_step import Batch
from rloop_mcore.run_state import RunState
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


SKIPPED = {"skipped": 1.0, "loss": float("nan"), "grad_norm": float("nan")}


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
    """An RL step: four trajectories of problem `easy`, all right, and twelve of `hard`, of which `successes` are.

    The updates of the (iteration, step) in `skipped` are.
    """

    def __init__(self, actor: NumberActor, cache: TrajectoryCache, successes: int, skipped: Container[Any]) -> None:
        self.actor, self.cache, self.successes, self.skipped = actor, cache, successes, skipped

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
        if (iteration, step) in self.skipped:
            return {"success_rate": 0.5, **SKIPPED}
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
    skipped: Container[Any] = (),
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
        calls += [(cache, "write_experts"), (tracker, "offset")]
        calls += [(journal, "record"), (tracker, "log"), *([] if evaluator is None else [(evaluator, "evaluate")])]
        for owner, name in calls:
            setattr(owner, name, kills.before(getattr(owner, name)))
    state = RunState(config, directory, journal, actor, rollout, cache, evaluator, tracker, stop)  # type: ignore[arg-type]
    try:
        state.recover()
        step = HashStep(actor, cache, successes, skipped)
        theta = RLoop(config, state, actor, step).run(Policy(base, "ba5e" * 16), demonstrations)  # type: ignore[arg-type]
        assert theta == journal.start_policy(config.algorithm.iterations)
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
        "experts": {path.parent.name: list(cache.experts(path.parent)) for path in directory.rglob("lineage.json")},
        "checkpoints": sorted(path.name for path in (directory / "checkpoints").iterdir()),
        "evaluations": {path.name: path.read_text() for path in (directory / "evaluation").glob("*.json")},
    }


def policies(directory: Path) -> list[str]:
    return [r["path"] for r in Journal(directory / "journal.jsonl").records if r["event"] == "policy"]


def test_exploitation_starts_from_the_same_theta_as_exploration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the journal's paths hold wherever the run was started
    actor = start(Path("run"), configure(), evaluated=False)
    assert actor.begun == ["base", "base", "theta_1", "theta_1"]
    assert policies(tmp_path / "run") == [str(tmp_path / "base"), "policies/theta_1", "policies/theta_2"]


def test_without_the_reset_exploitation_starts_from_the_rl_endpoint(tmp_path: Path) -> None:
    actor = start(tmp_path / "run", configure("algorithm.reset=false"), evaluated=False)
    assert actor.begun == ["base", "i0_explore_000003", "theta_1", "i1_explore_000003"]


def test_without_rft_the_rl_endpoint_is_the_next_theta(tmp_path: Path) -> None:
    actor = start(tmp_path / "run", configure("rft.enabled=false"), evaluated=False)
    assert actor.begun == ["base", "i0_explore_000003"]
    assert policies(tmp_path / "run")[1:] == ["policies/i0_explore_000003", "policies/i1_explore_000003"]


@pytest.mark.parametrize("reset", [True, False])
def test_an_empty_expert_set_leaves_what_would_be_fine_tuned_and_says_so(tmp_path: Path, reset: bool) -> None:
    start(tmp_path / "run", configure(f"algorithm.reset={reset}"), successes=0)
    records = [r for r in Journal(tmp_path / "run" / "journal.jsonl").records if r["event"] == "policy"]
    base, endpoints = str(tmp_path / "base"), [f"policies/i{iteration}_explore_000003" for iteration in (0, 1)]
    assert [record["path"] for record in records] == [base, *([base] * 2 if reset else endpoints)]
    assert [record["reason"] for record in records[1:]] == ["no expert trajectory: nothing to fine-tune on"] * 2


def experts(directory: Path) -> list[tuple[int, set[int]]]:
    """By iteration: how many experts, and which iterations their trajectories are of."""
    folders = sorted((directory / "experts").iterdir())
    tables = [pq.read_table(folder / "shard-000000.parquet") for folder in folders]
    return [(len(table), set(table["iteration"].to_pylist())) for table in tables]


def test_only_the_hard_problem_gives_experts_of_its_own_phase(tmp_path: Path) -> None:
    start(tmp_path / "run", configure(), evaluated=False)
    assert experts(tmp_path / "run") == [(3, {0}), (3, {1})]


def test_without_the_hard_filter_every_success_is_an_expert(tmp_path: Path) -> None:
    start(tmp_path / "run", configure("algorithm.hard_threshold=null"), evaluated=False)
    assert experts(tmp_path / "run") == [(15, {0}), (15, {1})]


def test_experts_of_earlier_iterations_on_request(tmp_path: Path) -> None:
    start(tmp_path / "run", configure("rft.earlier_iterations=1", "algorithm.iterations=3"), evaluated=False)
    assert experts(tmp_path / "run") == [(3, {0}), (6, {0, 1}), (6, {1, 2})]


def test_each_policy_is_measured_once_by_its_own_weights(tmp_path: Path) -> None:
    start(tmp_path / "run", configure())
    names = [r["name"] for r in Journal(tmp_path / "run" / "journal.jsonl").records if r["event"] == "measured"]
    explored = [f"i{i}_{phase}" for i in (0, 1) for phase in ("explore_000002", "explore_000003", "exploit_000000")]
    assert names == ["base", *explored]
    for path in (tmp_path / "run" / "evaluation").glob("*.json"):
        record = json.loads(path.read_text())
        assert (tmp_path / "run" / record["policy"] / "number").read_text() == record["number"], path.name


DEMONSTRATIONS = [Example((1,), (n,)) for n in range(3)]


def test_each_phase_has_its_schedule_its_loss_and_its_order_of_the_examples(tmp_path: Path) -> None:
    begun, trained = [], []

    class Told(NumberActor):
        def begin(self, policy: Path, optimizer: OptimizerConfig, total_updates: int) -> None:
            begun.append((policy.name, optimizer.lr, total_updates))
            super().begin(policy, optimizer, total_updates)

        def fine_tune(self, batch: Sequence[Example], loss: str) -> dict[str, float]:
            trained.append((loss, [example.response_ids for example in batch]))
            return super().fine_tune(batch, loss)

    rates = ["optimizer.lr=1", "sft.optimizer.lr=2", "rft.optimizer.lr=3", "algorithm.updates_per_step=4"]
    phases = ["sft.batch_size=2", "sft.epochs=2", "rft.loss=reward_weighted", "run.seed=8"]
    run = tmp_path / "run"
    start(run, configure(*rates, *phases), evaluated=False, demonstrations=DEMONSTRATIONS, actor=Told())
    assert begun == [("base", 2.0, 4), *((f"theta_{i}", *what) for i in (0, 1) for what in ((1.0, 12), (3.0, 3)))]
    expected = []
    for phase, iteration, loss, size, updates in [
        ("sft", 0, "token_mean", 2, 4),
        ("exploit", 0, "reward_weighted", 1, 3),
        ("exploit", 1, "reward_weighted", 1, 3),
    ]:
        found = TrajectoryCache(run / "cache").experts(run / "experts" / f"i{iteration}")
        examples, seed = (DEMONSTRATIONS if phase == "sft" else found), derive_seed(8, phase, iteration)
        batches = [batch_indices(update, 3, size, seed) for update in range(updates)]
        expected += [(loss, [examples[i].response_ids for i in batch]) for batch in batches]
    assert trained == expected


def test_a_version_names_one_policy_and_a_line_the_rl_steps_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[int, str]] = []
    plain = NumberRollout.sync

    def sync(self: NumberRollout, export: Callable[[], Iterator[tuple[str, Any]]], version: int) -> dict[str, float]:
        plain(self, export, version)
        synced.append((version, self.number))
        return {}

    def settle(self: Feed[Batch], version: int) -> None:
        settled.append(version)

    def train(self: HashStep, iteration: int, step: int, batch: Batch, version: int) -> dict[str, float]:
        assert version == synced[-1][0] == settled[-1], "of the weights that actor and engines hold"
        return plain_train(self, iteration, step, batch, version)

    settled, plain_train = list[int](), HashStep.train
    monkeypatch.setattr(NumberRollout, "sync", sync)
    monkeypatch.setattr(HashStep, "train", train)
    monkeypatch.setattr(Feed, "settle", settle)
    start(tmp_path / "run", configure("sft.batch_size=1"), demonstrations=DEMONSTRATIONS)
    assert len(settled) == 2 * 3
    assert [version for version, _ in synced] == sorted(version for version, _ in synced)
    # theta_0 and three steps, theta_1 and three steps, theta_2
    versions, policies = ({each[place] for each in synced} for place in (0, 1))
    assert len(set(synced)) == len(versions) == len(policies) == 9
    assert len(synced) == 9 + 2  # a theta once more where its exploration begins, and none twice on the way

    taken, lines = 0, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        taken += line["phase"] == "explore"
        assert line["global_step"] == (line["step"] if line["phase"] == "sft" else taken), line
    assert taken == 2 * 3


@pytest.mark.parametrize(
    ("demonstrations", "words"),
    [(None, "the base model"), (DEMONSTRATIONS, "the base model fine-tuned on 3 demonstrations")],
)
def test_the_journal_says_what_theta_0_is(tmp_path: Path, demonstrations: list[Example] | None, words: str) -> None:
    start(tmp_path / "run", configure("sft.batch_size=2"), demonstrations=demonstrations)
    lines = map(json.loads, (tmp_path / "run" / "journal.jsonl").read_text().splitlines())
    (theta,) = [x for x in lines if x["event"] == "policy" and x["iteration"] == 0]
    assert theta["reason"] == words
    assert theta["path"] == (str(tmp_path / "base") if demonstrations is None else "policies/theta_0")


@pytest.mark.parametrize("sleep", [True, False])
def test_trainer_and_engines_make_room_for_each_other_where_they_share_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sleep: bool
) -> None:
    calls = list[str]()

    def told(owner: type, name: str, plain: Callable[..., Any]) -> None:
        monkeypatch.setattr(owner, name, lambda *args: calls.append(name) or plain(*args), raising=False)

    told(NumberActor, "begin", NumberActor.begin)
    told(NumberActor, "make_room", lambda actor: None)
    told(NumberRollout, "sync", NumberRollout.sync)
    told(NumberRollout, "sleep", NumberRollout.sleep)
    plain = HashStep.train

    def train(*args: Any) -> dict[str, float]:
        assert [call for call in calls if call in ("sleep", "sync")][-1] == "sync", "samples of engines without weights"
        return plain(*args)

    monkeypatch.setattr(HashStep, "train", train)
    start(tmp_path / "run", configure(f"rollout.sleep={sleep}", "algorithm.iterations=1"))
    before = {name: {calls[i - 1] for i, call in enumerate(calls) if call == name} for name in ("begin", "sync")}
    if sleep:
        assert before == {"begin": {"sleep"}, "sync": {"make_room"}}
    else:
        assert set(calls) == {"begin", "sync"}


def test_a_large_write_begins_once_the_last_of_its_kind_would_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs: dict[str, list[int]] = {"checkpoints": [], "policies": []}
    plain = space.Space.write

    def write(self: space.Space, what: str, action: Callable[[], Any], needed: int = 0) -> Any:
        needs.get(what.split("/")[0], []).append(needed)
        return plain(self, what, action, needed)

    class Growing(NumberActor):
        """Each of its checkpoints is larger than the one before, and so is each of its policies."""

        written: ClassVar[list[int]] = []

        def finish_save(self) -> None:
            assert self.saving is not None
            path = self.saving[0]
            super().finish_save()
            (path / "state").write_bytes(bytes(len(self.written)))
            self.written.append(64 + len(self.written))  # with the 64 hex digits of the number

        def save_policy(self, path: Path) -> Policy:
            policy = super().save_policy(path)
            (path / "model.safetensors").write_bytes(bytes(2000))
            return policy

    monkeypatch.setattr(space.Space, "write", write)
    write_policy(tmp_path / "base", "ba5e" * 16)
    (tmp_path / "base" / "model.safetensors").write_bytes(bytes(1000))
    start(tmp_path / "run", configure("checkpoint.asynchronous=true"), evaluated=False, actor=Growing())
    assert needs["checkpoints"] == [0, *Growing.written[:-1]]
    # two RL policies and theta_1 where base began, the same again where theta_1 did
    assert needs["policies"] == [1000] * 3 + [2000] * 3


def events(directory: Path, event: str) -> list[dict[str, Any]]:
    return [record for record in Journal(directory / "journal.jsonl").records if record["event"] == event]


def missing(directory: Path) -> set[str]:
    """Policies that the journal names, does not call removed, and that are not there whole: as their digest says."""
    named = {r["path"]: r["digest"] for r in Journal(directory / "journal.jsonl").records if "digest" in r}
    gone = {path for record in events(directory, "removed") for path in record["paths"]}
    numbers = {path: directory / path / "number" for path in named.keys() - gone}
    return {path for path, file in numbers.items() if not file.exists() or file.read_text() != named[path]}


KEEPING = ["checkpoint.keep_best=1", "checkpoint.policy_steps=[1]", "data.validation=v"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["checkpoint.every=1"],
        ["checkpoint.every=1", "checkpoint.asynchronous=true"],
        ["checkpoint.every=2"],
        [*KEEPING, "checkpoint.every=2", "checkpoint.asynchronous=true"],
        [*KEEPING, "algorithm.reset=false"],
        [*KEEPING, "rft.enabled=false"],
    ],
    ids=" ".join,
)
def test_a_kill_before_any_change_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    config = configure(*overrides, "sft.batch_size=1")
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # what a kill leaves, the system keeps: it only costs time here

    whole, copies = tmp_path / "whole", tmp_path / "copies"
    kills = Kills(whole, copies)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", kills.before(shutil.rmtree))
        patch.setattr(run_state, "remove", kills.before(run_state.remove))
        patch.setattr(commits, "remove", kills.before(commits.remove))
        start(whole, config, kills, demonstrations=DEMONSTRATIONS)
    expected = facts(whole)
    assert kills.count > 70
    for directory in sorted(copies.iterdir()):
        assert not missing(directory), f"kill before change {directory.name}"
        start(directory, config, demonstrations=DEMONSTRATIONS)
        assert facts(directory) == expected, f"kill before change {directory.name}"


def test_fine_tuning_that_was_made_shorter_ends(tmp_path: Path) -> None:
    """`--force rft.batch_size=3` after the second of three updates: one update is what there is now."""
    with pytest.raises(Interrupted):
        start(
            tmp_path / "run", configure("rft.batch_size=1"), evaluated=False, stop=after(tmp_path / "run", "exploit", 2)
        )
    start(tmp_path / "run", configure("rft.batch_size=3"), evaluated=False)
    commits = [r for r in Journal(tmp_path / "run" / "journal.jsonl").records if r["event"] == "commit"]
    assert [r["step"] for r in commits if r["iteration"] == 0 and r["phase"] == "exploit"] == [1, 2]
    assert [r["step"] for r in commits if r["iteration"] == 1 and r["phase"] == "exploit"] == [1]


def after(run: Path, phase: str, step: int) -> Callable[[], bool]:
    """Stop at the commit of this step of the phase in iteration 0."""

    def stop() -> bool:
        records = Journal(run / "journal.jsonl").records
        last = records[-1] if records else {}
        return last.get("event") == "commit" and (last["phase"], last["step"]) == (phase, step - 1)

    return stop


class FullOnce:
    """The n-th call of those it was put before, and no other, finds no space."""

    def __init__(self, number: int) -> None:
        self.number, self.count = number, 0

    def before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def maybe_full(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count != self.number + 1:
                return call(*args, **kwargs)
            if call.__name__ == "finish_save":  # it ends the checkpoint either way
                shutil.rmtree(unfinished(call.__self__.saving[0]))  # type: ignore[attr-defined]
                call.__self__.saving = None  # type: ignore[attr-defined]
                raise DiskFull("the checkpoint was not written")
            raise OSError(errno.ENOSPC, "No space left on device")

        # what `log` has no space for it keeps: tests/test_tracking.py
        return call if call.__name__ == "log" else maybe_full


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_is_full_for_a_moment_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    """Wherever it happens; an asynchronous checkpoint is then covered by the commit that follows."""
    short = ["algorithm.iterations=1", "algorithm.rl_steps=2", "sft.batch_size=2"]
    config = configure(f"checkpoint.asynchronous={asynchronous}", *short)
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr(space.time, "sleep", lambda seconds: None)
    start(tmp_path / "whole", config, demonstrations=DEMONSTRATIONS)
    expected, number, reached = facts(tmp_path / "whole"), 0, True
    while reached:
        full = FullOnce(number)
        start(tmp_path / str(number), config, full, demonstrations=DEMONSTRATIONS)  # type: ignore[arg-type]
        assert facts(tmp_path / str(number)) == expected, f"full at call {number}"
        reached, number = full.count > number, number + 1
    assert number > 30


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


def test_a_start_removes_what_a_kill_left_and_nothing_of_somebody_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(run, configure("checkpoint.keep=3"))
    checkpoints = [f"checkpoints/{path.name}" for path in (run / "checkpoints").iterdir()]
    assert len(checkpoints) == 3
    mine = ["policies/mine/model.safetensors", "evaluation/notes.json", "checkpoints/theta_1_hf/x", "experts/i0_old/x"]
    mine += ["evaluation/i0_explore_000002.parquet"]  # the samples of a policy that was measured
    left = ["policies/theta_9/x", "policies/i9_explore_000002/x", "policies/.tmp-7-theta_3/x", "experts/i9/x"]
    left += [
        f"evaluation/{name}" for name in ("i9_exploit_000000.json", "i9_exploit_000000.parquet", ".tmp-7-base.json")
    ]
    left += ["checkpoints/.tmp-removed-i0_explore_000001/x"]
    for name in (*mine, *left):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).touch()
    start(run, configure("checkpoint.keep=3"))
    assert [name for name in (*mine, *checkpoints) if not (run / name).exists()] == []
    assert [name for name in left if (run / name.removesuffix("/x")).exists()] == []


def test_what_the_journal_names_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of its kind too: its folder is in the run directory durably."""
    run, durable = tmp_path / "run", dict[str, set[str]]()
    fsync, record = os.fsync, Journal.record

    def fsynced(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_dir():
            durable[str(path)] = set(os.listdir(path))

    def recorded(self: Journal, event: str, **fields: Any) -> None:
        if (name := fields.get("path", "base")).startswith(("policies/", "experts/")):
            named.append(name)
            for path in (run / name, (run / name).parent):
                assert path.name in durable[str(path.parent)], f"{path} at record {event}"
        record(self, event, **fields)

    named: list[str] = []
    monkeypatch.setattr(os, "fsync", fsynced)
    monkeypatch.setattr(Journal, "record", recorded)
    start(run, configure(), demonstrations=DEMONSTRATIONS)
    assert {name.partition("/")[0] for name in named} == {"policies", "experts"}


def test_more_checkpoints_may_be_kept_after_a_restart(tmp_path: Path) -> None:
    answers = iter([False, False, True])
    with pytest.raises(Interrupted):
        start(tmp_path / "run", configure(), stop=lambda: next(answers, False))
    start(tmp_path / "run", configure("checkpoint.keep=4"))
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 4


@pytest.mark.parametrize(("iteration", "phase"), [(0, "explore"), (1, "explore"), (1, "exploit")])
def test_a_checkpoint_that_is_gone_is_told_and_its_phase_can_begin_anew(
    tmp_path: Path, iteration: int, phase: str
) -> None:
    """With checkpoint.keep=1 the one before the last commit is gone where the journal lost its last line."""
    config, run, whole = configure("rft.deduplicate=false"), tmp_path / "run", tmp_path / "whole"
    start(whole, config)
    shutil.copytree(whole, run)
    journal = run / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    last = max(n for n, r in enumerate(Journal(journal).records) if place_of(r) == (iteration, phase, "commit"))
    journal.write_bytes(b"".join(lines[:last]))
    with pytest.raises(UserError, match=rf"is gone, .*cut {journal} before line (\d+) to begin this phase") as told:
        start(run, config)
    cut = int(str(told.value).partition("before line ")[2].split()[0])
    assert place_of(Journal(journal).records[cut - 1]) == (iteration, phase, "commit")
    journal.write_bytes(b"".join(lines[: cut - 1]))
    start(run, config)
    assert facts(run) == facts(whole)


def place_of(record: dict[str, Any]) -> tuple[Any, ...]:
    return record.get("iteration"), record.get("phase"), record["event"]


def folders(directory: Path) -> set[str]:
    return {path.name for path in (directory / "policies").iterdir()}


def averages(directory: Path) -> dict[str, float]:
    return {record["name"]: record["metrics"]["avg@1"] for record in events(directory, "measured")}


def test_of_the_measured_policies_the_best_are_kept(tmp_path: Path) -> None:
    """Beside every theta; an RL endpoint that is not among them goes when its iteration's exploitation is done."""
    start(tmp_path / "run", configure("checkpoint.keep_best=2", "data.validation=v"))
    by_average = averages(tmp_path / "run")
    del by_average["base"]
    best = sorted(by_average, key=lambda name: -by_average[name])[:2]
    expected = {name for name in best if "explore" in name} | {"theta_1", "theta_2"}
    assert folders(tmp_path / "run") == expected
    gone = {path for record in events(tmp_path / "run", "removed") for path in record["paths"]}
    assert {f"policies/{name}" for name in by_average if "explore" in name and name not in best} == gone
    assert len(gone) > 1
    assert len(list((tmp_path / "run" / "evaluation").glob("*.json"))) == 7


def test_policies_do_not_pile_up_within_a_phase(tmp_path: Path) -> None:
    seen = []

    class Counting(NumberActor):
        def save_policy(self, path: Path) -> Policy:
            seen.append(len(list(path.parent.glob("i0_explore_*"))))
            return super().save_policy(path)

    config = configure("checkpoint.keep_best=1", "data.validation=v", "algorithm.rl_steps=8", "evaluation.every=1")
    config.algorithm.iterations = 1
    start(tmp_path / "run", config, actor=Counting())
    assert len(seen) == 8 + 1
    assert max(seen) == 2  # the best and the newest


def test_the_endpoint_is_there_while_something_may_start_from_it(tmp_path: Path) -> None:
    overrides = [*KEEPING, "algorithm.reset=false", "checkpoint.policy_steps=[]"]
    actor = start(tmp_path / "run", configure(*overrides))
    endpoints = [name for name in actor.begun if "explore_000003" in name]
    assert endpoints == ["i0_explore_000003", "i1_explore_000003"]
    assert not set(endpoints) <= folders(tmp_path / "run")


def test_policies_of_chosen_steps_are_kept_measured_or_not(tmp_path: Path) -> None:
    start(tmp_path / "run", configure("checkpoint.keep_best=1", "checkpoint.policy_steps=[1,2]", "data.validation=v"))
    chosen = {f"i{iteration}_explore_{step:06d}" for iteration in (0, 1) for step in (1, 2)}
    assert chosen <= folders(tmp_path / "run")
    numbers = {(tmp_path / "run" / "policies" / name / "number").read_text() for name in chosen}
    assert len(numbers) == 4
    assert not missing(tmp_path / "run")
    assert not any("000001" in name for name in averages(tmp_path / "run"))


def test_a_policy_that_a_commit_has_kept_is_measured_as_it_is(tmp_path: Path) -> None:
    """Saved again, a kill amid it would leave half of what the journal names."""
    saved: list[str] = []

    class Watched(NumberActor):
        def save_policy(self, path: Path) -> Policy:
            saved.append(path.name)
            return super().save_policy(path)

    answers = iter([True])
    with pytest.raises(Interrupted):
        start(tmp_path / "run", configure(*KEEPING), stop=lambda: next(answers), actor=Watched())
    start(tmp_path / "run", configure(*KEEPING, "evaluation.every=1"), actor=Watched())
    assert "i0_explore_000001" in averages(tmp_path / "run")
    assert saved.count("i0_explore_000001") == 1


def test_what_is_kept_may_change_after_a_restart(tmp_path: Path) -> None:
    """Fewer: the others go at once. More: what is gone stays gone, and nothing misses it."""
    start(tmp_path / "run", configure())
    assert len(folders(tmp_path / "run")) == 6
    start(tmp_path / "run", configure("checkpoint.keep_best=1", "data.validation=v"))
    kept = folders(tmp_path / "run")
    assert {"theta_1", "theta_2"} <= kept
    assert len(kept) <= 3
    start(tmp_path / "run", configure("checkpoint.keep_best=6", "data.validation=v"))
    assert folders(tmp_path / "run") == kept


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


def test_what_is_removed_has_lost_its_name_on_disk_before_its_files_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    durable, gone, rmtree = set[str](), list[str](), shutil.rmtree
    monkeypatch.setattr(os, "fsync", lambda fd: durable.update(os.listdir(f"/proc/self/fd/{fd}")))

    def removed(path: Path) -> None:
        gone.append(path.name)
        assert path.name in durable
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", removed)
    (tmp_path / "i0_explore_000001").mkdir()
    commits.remove(tmp_path / "i0_explore_000001")
    assert gone == [".tmp-removed-i0_explore_000001"]
    assert list(tmp_path.iterdir()) == []


def guarded(directory: Path) -> list[tuple[int, str, int, str]]:
    records = [record for record in Journal(directory / "journal.jsonl").records if record["event"] == "guard"]
    return [(record["iteration"], record["phase"], record["step"], record["policy"]) for record in records]


def rl_steps(directory: Path) -> list[tuple[int, int, int]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(line["iteration"], line["step"], line["global_step"]) for line in lines if line["phase"] == "explore"]


BAD = {(0, 0), (0, 2), (0, 3), (1, 4)}  # iteration 0 has two in a row, iteration 1 has not
LONG = ("algorithm.rl_steps=5", "guard.patience=2")


def test_end_phase_takes_the_bad_step_as_the_last_of_the_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = list[int]()

    def sync(self: NumberRollout, export: Callable[[], Iterator[tuple[str, Any]]], version: int) -> dict[str, float]:
        self.number = next(export())[0]
        versions.append(version)
        return {}

    monkeypatch.setattr(NumberRollout, "sync", sync)
    run = tmp_path / "run"
    ablation = ("algorithm.reset=false", "rft.deduplicate=false", "checkpoint.every=5")
    start(run, configure(*LONG, "guard.policy=end_phase", *ablation), skipped=BAD)
    assert guarded(run) == [(0, "explore", 4, "end_phase")]
    assert [record["bad_steps"] for record in events(run, "guard")] == [2]
    # curves go on without a gap, the engines' weight versions never go back
    assert rl_steps(run) == [(0, n, n) for n in range(1, 5)] + [(1, n, 4 + n) for n in range(1, 6)]
    assert versions == sorted(versions)
    records = Journal(run / "journal.jsonl").records
    assert [r["step"] for r in records if r["event"] == "done" and r["phase"] == "explore"] == [4, 5]
    # its endpoint is measured, and fine-tuning starts there without the reset
    names = [r["name"] for r in records if r["event"] == "measured" and r["name"].startswith("i0")]
    assert names == ["i0_explore_000002", "i0_explore_000004", "i0_exploit_000000"]
    # the experts are of the steps there were: a success each
    assert [r["experts"] for r in records if r["event"] == "done" and r["phase"] == "select"] == [4, 5]


@pytest.mark.parametrize(("every", "asynchronous"), [(1, False), (5, True)])
def test_a_kill_amid_bad_steps_changes_nothing_of_how_the_phase_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int, asynchronous: bool
) -> None:
    checkpoints = (f"checkpoint.every={every}", f"checkpoint.asynchronous={asynchronous}", "evaluation.every=3")
    config = configure(*LONG, *checkpoints, "guard.policy=end_phase", "algorithm.iterations=1")
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    whole, copies = tmp_path / "whole", tmp_path / "copies"
    kills = Kills(whole, copies)
    start(whole, config, kills, demonstrations=DEMONSTRATIONS, skipped=BAD)
    expected = facts(whole)
    assert guarded(whole) == [(0, "explore", 4, "end_phase")]
    assert kills.count > 20
    for directory in sorted(copies.iterdir()):
        start(directory, config, demonstrations=DEMONSTRATIONS, skipped=BAD)
        assert facts(directory) == expected, f"kill before change {directory.name}"


def test_stop_commits_and_stops_again_until_the_policy_changes(tmp_path: Path) -> None:
    run, stopping = tmp_path / "run", configure(*LONG, "checkpoint.every=5")
    for _ in range(2):
        with pytest.raises(
            Fault, match=r"iteration 0 explore, step 4: 2 bad in a row, .* loss nan.*guard\.policy=skip"
        ):
            start(run, stopping, skipped=BAD)
        assert guarded(run) == [(0, "explore", 4, "stop")]
        assert Journal(run / "journal.jsonl").newest("commit", 0, "explore")["step"] == 4  # type: ignore[index]
    start(run, configure(*LONG, "guard.policy=skip"), skipped=BAD)
    assert guarded(run) == [(0, "explore", 4, "stop"), (0, "explore", 4, "skip")]

    start(tmp_path / "skip", configure(*LONG, "guard.policy=skip"), skipped=BAD)
    assert guarded(tmp_path / "skip") == [(0, "explore", 4, "skip")]
    assert len(rl_steps(run)) == 10
    for fact in ("cache", "metrics", "files", "evaluations"):
        assert facts(run)[fact] == facts(tmp_path / "skip")[fact]


def test_without_bad_steps_in_a_row_the_guard_is_silent(tmp_path: Path) -> None:
    start(tmp_path / "run", configure("algorithm.rl_steps=5", "guard.patience=3"), skipped=BAD)
    assert guarded(tmp_path / "run") == []


class BrokenFineTuning(NumberActor):
    """From its third update on, fine-tuning changes nothing."""

    updates = 0

    def begin(self, policy: Path, optimizer: OptimizerConfig, total_updates: int) -> None:
        super().begin(policy, optimizer, total_updates)
        self.updates = 0

    def fine_tune(self, batch: Sequence[Example], loss: str) -> dict[str, float]:
        self.updates += 1
        return SKIPPED if self.updates > 2 else super().fine_tune(batch, loss)


@pytest.mark.parametrize(("updates", "early"), [(5, True), (4, False)])
def test_fine_tuning_ends_early_with_the_weights_it_has(tmp_path: Path, updates: int, early: bool) -> None:
    run, length = tmp_path / "run", f"algorithm.rl_steps={updates}"  # an expert each
    start(run, configure(*LONG, length, "guard.policy=end_phase"), actor=BrokenFineTuning())
    assert guarded(run) == [(0, "exploit", 4, "end_phase"), (1, "exploit", 4, "end_phase")]
    assert [record["early"] for record in events(run, "guard")] == [early] * 2
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    bad = [line["bad_steps"] for line in lines if line["phase"] == "exploit"]
    assert bad == [0, 0, 1, 2] * 2
    assert policies(run)[1:] == ["policies/theta_1", "policies/theta_2"]
