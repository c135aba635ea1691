"""A run whose draws depend on the success counts in its cache: it goes on after any kill as if there had been none."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from rloop_mcore.compose import load_config
from rloop_mcore.config import Config, TrackingConfig
from rloop_mcore.data.curriculum import SampledCurriculum
from rloop_mcore.data.prompts import TemplatePrompts
from rloop_mcore.data.templates import PromptTemplate
from rloop_mcore.journal import Journal
from rloop_mcore.loop import RLoop
from rloop_mcore.protocols import Answered
from rloop_mcore.rl_step import RLStep
from rloop_mcore.run_state import RunState
from rloop_mcore.tracking import Tracker
from rloop_mcore.trajectory.cache import TrajectoryCache
from rloop_mcore.trajectory.compact import compact
from rloop_mcore.types import Completion, Policy, Problem, SampleRequest, Sampling, Verdict, Visit
from tests.data.chat_tokenizer import write_chat_tokenizer
from tests.test_loop import Kills, NumberActor, write_policy

PROBLEMS = [Problem(f"p{n}", f"{n}?", "1") for n in range(12)]


def sampler(problems: Sequence[Problem], visits: Mapping[str, Sequence[Visit]]) -> list[float]:
    """Depends on all of it: steps, samples and successes of every visit."""
    hashes = (hashlib.sha256(repr(visits[problem.id]).encode()).digest() for problem in problems)
    return [0.05 + digest[0] for digest in hashes]


class EchoRollout:
    """Answers with the seed."""

    def sync(self, export: Callable[[], Iterator[tuple[str, Any]]], version: int) -> dict[str, float]:
        return {}

    def submit(
        self, requests: Sequence[SampleRequest], sampling: Sampling, enough: int | None, answered: Answered
    ) -> Future[Any]:
        completions = [Completion((r.seed % 1000,), (-0.5,), "stop", ((1, 1),)) for r in requests]
        answered(range(len(requests)), completions)
        future: Future[Any] = Future()
        future.set_result(completions)
        return future

    def wait(self, future: Future[Any], version: int | None = None) -> Any:
        return future.result(timeout=30)

    def cancel(self) -> None:
        pass


class SeedRewards:
    def grade(self, items: Iterable[tuple[Problem, str, bool]]) -> list[Verdict]:
        return [Verdict(hashlib.sha256(text.encode()).digest()[0] < 128, "") for _, text, _ in items]


def start(directory: Path, config: Config, kills: Kills | None = None, merge: bool = False) -> None:
    """One process of a run: everything is made anew from the directory."""
    directory.mkdir(exist_ok=True)
    base, folder = directory.parent / "base", directory.parent / "tokenizer"
    if not base.exists():
        write_policy(base, "ba5e" * 16)
        folder.mkdir()
        write_chat_tokenizer(folder)
    actor, journal, rollout = NumberActor(), Journal(directory / "journal.jsonl"), EchoRollout()
    if merge and (directory / "cache").exists():
        compact(directory / "cache", journal.shards())
    cache = TrajectoryCache(directory / "cache")
    tracker = Tracker(directory, TrackingConfig(tensorboard=False, progress=False))
    if kills is not None:
        calls = [(actor, "start_save"), (actor, "finish_save"), (cache, "seal"), (journal, "record"), (tracker, "log")]
        for owner, name in calls:
            setattr(owner, name, kills.before(getattr(owner, name)))
    tokenizer = write_chat_tokenizer(folder)
    prompts = TemplatePrompts(PROBLEMS, tokenizer, PromptTemplate("countdown", tokenizer), config.run.seed, 99)
    curriculum = SampledCurriculum(config.data.sampler, PROBLEMS) if config.data.sampler else None
    state = RunState(config, directory, journal, actor, rollout, cache, None, tracker, lambda: False)  # type: ignore[arg-type]
    try:
        state.recover()
        step = RLStep(config, actor, rollout, SeedRewards(), prompts, cache, curriculum=curriculum)  # type: ignore[arg-type]
        RLoop(config, state, actor, step).run(Policy(base, "ba5e" * 16), None)  # type: ignore[arg-type]
    finally:
        tracker.close()


def drawn(directory: Path) -> tuple[list[tuple[str, Visit]], str, int]:
    """The problems of every step and how they went, all that was sampled, and where the order stands."""
    cache = TrajectoryCache(directory / "cache")
    return cache.visits(), cache.digest(), Journal(directory / "journal.jsonl").commits()[-1]["position"]


def configure(*overrides: str) -> Config:
    algorithm = {"iterations": 2, "rl_steps": 4, "group_size": 2, "sampled_per_step": 3, "prompts_per_step": 3}
    algorithm |= {"sampling_rounds": 2, "updates_per_step": 0}
    settings = [f"algorithm.{key}={value}" for key, value in algorithm.items()]
    rest = ["run.dir=r", "model.path=m", "data.train=d", "rft.enabled=false", "algorithm.overlong_buffer=0"]
    return load_config([*rest, *settings, f"data.sampler={__name__}:sampler", *overrides])


@pytest.mark.parametrize(("max_lag", "every"), [(0, 1), (1, 2)])
def test_a_kill_changes_no_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_lag: int, every: int) -> None:
    config = configure(f"rollout.max_lag={max_lag}", f"checkpoint.every={every}")
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    whole, copies = tmp_path / "whole", tmp_path / "copies"
    kills = Kills(whole, copies)
    start(whole, config, kills)
    expected = drawn(whole)
    assert len({(visit.iteration, visit.step) for _, visit in expected[0]}) == 8
    assert kills.count > 25
    for directory in sorted(copies.iterdir()):
        start(directory, config, merge=True)
        assert drawn(directory) == expected, f"kill before change {directory.name}"


def test_what_is_drawn_follows_the_counts_and_by_default_the_order_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    runs = {
        name: configure(*keys)
        for name, keys in {"plain": ["data.sampler=null"], "weighted": [], "off": ["rollout.max_lag=1"]}.items()
    }
    for name, config in runs.items():
        start(tmp_path / name, config)
    plain, weighted, off = (drawn(tmp_path / name) for name in runs)
    assert plain[2] == sum(visit.samples for _, visit in plain[0]) // 2  # one place for each group
    assert weighted[2] > sum(visit.samples for _, visit in weighted[0]) // 2  # some are passed over
    assert len({digest for _, digest, _ in (plain, weighted, off)}) == 3
