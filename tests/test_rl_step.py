"""One DAPO step over scripted rooms: what is cached, kept, refilled, updated and refused."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import nullcontext

import pytest

from rloop_mcore import rl_step
from rloop_mcore.algorithm.advantage import group_advantages
from rloop_mcore.algorithm.guard import what_is_wrong
from rloop_mcore.compose import load_config
from rloop_mcore.errors import Fault
from rloop_mcore.protocols import Answered
from rloop_mcore.rl_step import MismatchError, RLStep, UnparsableError
from rloop_mcore.types import (
    Completion,
    Experience,
    Problem,
    Prompt,
    SampleRequest,
    Sampling,
    Times,
    Trajectory,
    Verdict,
    Visit,
)

PROBLEMS = [Problem(id=f"p{n}", problem=str(n), answer=str(n)) for n in range(6)]
GROUP = 4


class FixedPrompts:
    def draw(self, position: int, count: int, weights: Sequence[float] | None = None) -> tuple[list[Prompt], int]:
        numbers = [n % len(PROBLEMS) for n in range(position, position + count)]
        return [Prompt(PROBLEMS[n], (n,)) for n in numbers], position + count

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


class SeedEcho:
    """Answers with one token: the request's seed, so that a test sees which sample is which."""

    def __init__(self) -> None:
        self.requests: list[SampleRequest] = []
        self.enough: list[int | None] = []

    def sync(self, weights: object, version: int) -> dict[str, float]:
        return {}

    def answer(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        return [Completion((request.seed,), (-0.5,), "stop", ((1, 1),)) for request in requests]

    def submit(
        self, requests: Sequence[SampleRequest], sampling: Sampling, enough: int | None, answered: Answered
    ) -> Future:
        self.requests += requests
        self.enough.append(enough)
        self.sampling = sampling
        completions = self.answer(requests)
        answered(range(len(requests)), completions)
        future: Future = Future()
        future.set_result(completions)
        return future


def run(step: RLStep, iteration: int, number: int, position: int) -> tuple[int, dict[str, float]]:
    """One step on samples of the actor's own weights."""
    batch = step.collect(iteration, number, position)
    return batch.position, step.train(iteration, number, batch, version=1)


class ScriptedRewards:
    """The n-th answer to a problem is right when `right(problem id, n)` says so."""

    def __init__(self, right: Callable[[str, int], bool]) -> None:
        self.right, self.seen = right, dict.fromkeys([p.id for p in PROBLEMS], 0)

    def grade(self, items: Iterable[tuple[Problem, str, bool]]) -> list[Verdict]:
        verdicts = []
        for problem, _, _ in items:
            correct = self.right(problem.id, self.seen[problem.id])
            self.seen[problem.id] += 1
            verdicts.append(Verdict(correct, "correct" if correct else "wrong"))
        return verdicts


class RecordingActor:
    def __init__(self, mismatch: float = 0.0, skipped: float = 0.0) -> None:
        self.batches: list[list[Experience]] = []
        self.mismatch, self.skipped = mismatch, skipped

    def logprobs(self, batch: Sequence[Trajectory], of_reference: bool) -> list[tuple[float, ...]]:
        assert batch, "there is nothing to pack"
        return [(-7.0 if of_reference else -3.0,)] * len(batch)

    def update(self, batch: Sequence[Experience]) -> dict[str, float]:
        self.batches.append(list(batch))
        names = (
            "seconds_update",
            "loss",
            "entropy",
            "clip_fraction",
            "ratio_mean",
            "ratio_max",
            "tokens",
            "grad_norm",
            "lr",
        )
        return dict.fromkeys(names, 1.0) | {
            "skipped": self.skipped,
            "mismatch_max": self.mismatch,
            "mismatch_mean": self.mismatch / 10,
            "mismatch_k3": 0.0,
        }


class ListCache:
    def __init__(self) -> None:
        self.rows: list[Trajectory] = []

    def append(self, trajectories: Sequence[Trajectory]) -> None:
        self.rows += trajectories


def make(right: Callable[[str, int], bool], actor: RecordingActor | None = None, **algorithm: object) -> RLStep:
    settings = {"group_size": GROUP, "sampled_per_step": 3, "prompts_per_step": 2, "updates_per_step": 2} | algorithm
    config = load_config(
        ["run.dir=r", "model.path=m", "data.train=d", "rollout.mismatch_gate=0.01"]
        + [f"algorithm.{key}={value}" for key, value in settings.items()]
    )
    return RLStep(config, actor or RecordingActor(), SeedEcho(), ScriptedRewards(right), FixedPrompts(), ListCache())  # type: ignore[arg-type]


def first_only(problem: str, n: int) -> bool:
    return n % GROUP == 0


def test_every_sampled_trajectory_is_cached_before_any_group_is_dropped() -> None:
    step = make(lambda problem, n: problem != "p0" and first_only(problem, n))
    position, metrics = run(step, 1, 5, 0)
    assert position == 3
    assert [row.problem_id for row in step.cache.rows] == ["p0"] * 4 + ["p1"] * 4 + ["p2"] * 4
    assert {(row.iteration, row.step) for row in step.cache.rows} == {(1, 5)}
    trained = [row.trajectory.problem_id for batch in step.actor.batches for row in batch]
    assert sorted(trained) == ["p1"] * 4 + ["p2"] * 4
    assert metrics["groups_sampled"] == 3
    assert metrics["groups_kept"] == 2
    assert metrics["success_rate"] == pytest.approx(2 / 12)


def test_a_short_batch_is_refilled_and_surplus_groups_stay_in_the_cache() -> None:
    step = make(lambda problem, n: problem not in ("p0", "p1") and first_only(problem, n))
    position, metrics = run(step, 0, 0, 0)
    assert position == 6
    assert metrics["groups_kept"] == 2
    assert len(step.cache.rows) == 6 * GROUP
    trained = {row.trajectory.problem_id for batch in step.actor.batches for row in batch}
    assert trained == {"p2", "p3"}


def test_at_the_limit_of_rounds_it_goes_on_with_what_there_is() -> None:
    step = make(lambda problem, n: problem == "p4" and first_only(problem, n), sampling_rounds=2)
    position, metrics = run(step, 0, 0, 0)
    assert (position, metrics["groups_kept"]) == (6, 1)
    assert sum(len(batch) for batch in step.actor.batches) == GROUP


@pytest.mark.parametrize(
    "settings", [{}, {"old_logprobs": "trainer"}, {"kl_coefficient": 0.1}, {"overlong_filter": "true"}]
)
def test_without_an_informative_group_no_update_happens(settings: dict[str, object]) -> None:
    step = make(lambda problem, n: False, sampling_rounds=2, **settings)
    _, metrics = run(step, 0, 0, 0)
    assert step.actor.batches == []
    assert (metrics["groups_kept"], metrics["skipped"], metrics["success_rate"]) == (0, 2, 0)
    assert what_is_wrong(metrics, 0.1, 10.0) == ""  # the guard leaves it alone


def test_without_updates_a_step_only_samples() -> None:
    step = make(first_only, updates_per_step=0)
    _, metrics = run(step, 0, 0, 0)
    assert step.actor.batches == []
    assert len(step.cache.rows) == 3 * GROUP
    assert (metrics["updates"], metrics["skipped"], metrics["groups_kept"]) == (0, 0, 2)
    assert what_is_wrong(metrics, 0.1, 10.0) == ""


@pytest.mark.parametrize("norms", [[0.5, float("nan"), 9.0], [9.0, 0.5, float("nan")]])
def test_a_norm_that_is_not_finite_is_the_largest(norms: list[float]) -> None:
    actor = RecordingActor()
    plain, left = actor.update, iter(norms)
    actor.update = lambda batch: plain(batch) | {"grad_norm": next(left), "skipped": 0.0}  # type: ignore[method-assign]
    _, metrics = run(make(first_only, actor, updates_per_step=3), 0, 0, 0)
    assert math.isnan(metrics["grad_norm_max"])
    assert (metrics["updates"], metrics["skipped"]) == (3, 0)


def test_metrics_of_tokens_are_means_over_the_tokens_of_all_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """But those of the samples against the trainer are the first update's, which alone is held to the gate."""
    step = make(first_only)
    update, told = step.actor.update, iter([(10.0, 0.5, 1.0), (30.0, 0.9, 3.0)])
    of_an_update = ("loss", "grad_norm", "padding_share", "lr")
    of_the_first = ("mismatch_mean", "mismatch_max", "mismatch_k3", "ratio_mean", "ratio_max")

    def of_tokens(batch: Sequence[Experience]) -> dict[str, float]:
        tokens, entropy, number = next(told)
        figures = {"tokens": tokens, "entropy": entropy} | dict.fromkeys(of_an_update, number)
        return update(batch) | figures | dict.fromkeys(of_the_first, number - 1)

    beats = list[None]()
    monkeypatch.setattr(rl_step, "beat", lambda: beats.append(None))
    step.actor.update = of_tokens  # type: ignore[method-assign]
    _, metrics = run(step, 0, 0, 0)
    assert len(beats) == 2  # an update may be long: each tells the watchdog
    assert metrics["tokens"] == 40
    assert metrics["entropy"] == pytest.approx((10 * 0.5 + 30 * 0.9) / 40)
    assert (metrics["loss"], metrics["grad_norm"], metrics["padding_share"]) == (2.0, 2.0, 2.0)
    assert (metrics["grad_norm_max"], metrics["lr"]) == (3.0, 3.0)
    assert {metrics[name] for name in of_the_first} == {0.0}


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_problem_drawn_twice_in_a_step_gets_new_samples_and_seeds(rounds: int) -> None:
    step = make(first_only, sampled_per_step=9 // rounds, prompts_per_step=9, sampling_rounds=rounds)
    run(step, 0, 0, 0)
    keys = [(row.problem_id, row.sample) for row in step.cache.rows]
    assert len(set(keys)) == len(keys) == 9 * GROUP
    assert max(row.sample for row in step.cache.rows) == 2 * GROUP - 1
    assert all(row.group == row.sample // GROUP for row in step.cache.rows)
    assert len({request.seed for request in step.rollout.requests}) == len(keys)


def test_every_step_of_every_iteration_and_run_has_seeds_of_its_own() -> None:
    step = make(first_only, sampling_rounds=1)
    for run_seed, iteration, number in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)):
        step.config.run.seed = run_seed
        run(step, iteration, number, 0)
    assert len({request.seed for request in step.rollout.requests}) == 4 * 3 * GROUP
    places = [(row.trajectory.problem_id, row.trajectory.sample) for batch in step.actor.batches for row in batch]
    assert len({tuple(places[n : n + 2 * GROUP]) for n in range(0, len(places), 2 * GROUP)}) == 4  # the same two groups


def test_advantages_belong_to_their_trajectories() -> None:
    step = make(first_only)
    run(step, 0, 0, 0)
    right, wrong = group_advantages([1.0, 0.0, 0.0, 0.0], "group_std")[:2]
    rows = [row for batch in step.actor.batches for row in batch]
    assert all(row.advantage == (right if row.trajectory.correct else wrong) for row in rows)


def test_a_mismatch_over_the_gate_stops_with_a_clear_message() -> None:
    step = make(first_only, RecordingActor(mismatch=0.02))
    with pytest.raises(MismatchError, match=r"step 7: .* 0\.02 .*rollout\.mismatch_gate=0\.01"):
        run(step, 0, 7, 0)
    step = make(first_only, RecordingActor(mismatch=float("nan")))
    with pytest.raises(MismatchError):
        run(step, 0, 0, 0)


def test_a_mean_mismatch_over_its_gate_stops_too() -> None:
    step = make(first_only, RecordingActor(mismatch=0.02))
    step.config.rollout.mismatch_gate, step.config.rollout.mismatch_mean_gate = 0.1, 0.001
    with pytest.raises(MismatchError, match=r"mean 0\.002\), .*rollout\.mismatch_mean_gate=0\.001"):
        run(step, 0, 0, 0)


def test_unless_told_the_gate_is_narrow_in_fp32_alone() -> None:
    for precision, passes in (("fp32", False), ("bf16", True)):
        step = make(first_only, RecordingActor(mismatch=0.02))
        step.config.precision, step.config.rollout.mismatch_gate = precision, None
        with nullcontext() if passes else pytest.raises(MismatchError):
            run(step, 0, 0, 0)


@pytest.mark.parametrize(("mismatch", "said"), [(0.004, False), (0.008, True)])
def test_a_mismatch_of_more_than_half_the_gate_is_said(
    mismatch: float, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    run(make(first_only, RecordingActor(mismatch)), 0, 7, 0)
    assert ("step 7: trainer and engine logprobs differ by 0.008; the gate is 0.01" in caplog.text) == said
    assert ("logprobs differ" in caplog.text) == said


def test_a_first_update_that_is_skipped_for_nan_is_left_to_the_guard() -> None:
    step = make(first_only, RecordingActor(mismatch=float("nan"), skipped=1.0))
    _, metrics = run(step, 0, 0, 0)
    assert metrics["skipped"] == metrics["updates"] > 0
    step = make(first_only, RecordingActor(mismatch=0.02, skipped=1.0))  # for its gradient norm, say
    with pytest.raises(MismatchError):
        run(step, 0, 0, 0)


def test_an_overlong_response_loses_reward_but_stays_correct() -> None:
    step = make(first_only, overlong_buffer=3)
    step.config.rollout.max_tokens = 4
    long = Completion((1,) * 4, (-0.5,) * 4, "length", ((1, 4),))
    step.rollout.answer = lambda requests: [long] * len(requests)  # type: ignore[method-assign]
    run(step, 0, 0, 0)
    assert {(row.correct, row.reward) for row in step.cache.rows} == {(True, 0.0), (False, -1.0)}


def test_rewards_are_as_configured_while_success_and_informative_groups_go_by_the_verdict() -> None:
    plain, shaped = make(first_only), make(first_only)
    shaped.config.reward.correct, shaped.config.reward.wrong, shaped.config.reward.format_penalty = 2.0, -1.0, 0.5
    reasons = ["no_answer", "unparsable", "wrong", "truncated", *["correct", "wrong", "timeout", "wrong"] * 2]
    for step in (plain, shaped):
        step.rewards.grade = lambda items: [Verdict(r == "correct", r) for _, r in zip(items, reasons, strict=True)]
    (_, before), (_, after) = (run(step, 0, 0, 0) for step in (plain, shaped))
    assert {row.reward for row in plain.cache.rows} == {0.0, 1.0}
    rewards = {"no_answer": -1.5, "unparsable": -1.5, "truncated": -1.5, "wrong": -1, "timeout": -1, "correct": 2}
    assert all(row.reward == rewards[row.reason] for row in shaped.cache.rows)
    assert all(row.correct == (row.reason == "correct") for row in shaped.cache.rows)
    assert {t.trajectory.problem_id for batch in shaped.actor.batches for t in batch} == {"p1", "p2"}
    assert after["success_rate"] == before["success_rate"] == 2 / 12
    assert before["reward_mean"] == 2 / 12
    assert after["reward_mean"] == pytest.approx((2 * 2 - 7 - 3 * 1.5) / 12)


def test_a_step_reports_shares_and_means_of_all_that_was_sampled() -> None:
    step = make(first_only)
    step.stop, step.config.rollout.top_p, step.config.rollout.temperature = ("</answer>",), 0.9, 0.7
    ends = [("length", 4)] * 3 + [("stop", n) for n in range(1, 10)]
    sampled = [Completion((1,) * n, (-0.5,) * n, end, ((1, n),), 3, 5.0, 7.0) for end, n in ends]
    step.rollout.answer = lambda requests: sampled  # type: ignore[method-assign]
    reasons = ["truncated"] * 3 + ["correct"] * 2 + ["timeout", "crashed"] + ["unparsable"] * 4 + ["no_answer"]
    graded: list[tuple[Problem, str, bool]] = []

    def grade(items: Iterable[tuple[Problem, str, bool]]) -> list[Verdict]:
        graded.extend(items)
        return [Verdict(reason == "correct", reason, 11.0) for reason in reasons]

    step.rewards.grade = grade  # type: ignore[method-assign]
    _, metrics = run(step, 0, 0, 0)
    assert graded == [(PROBLEMS[i // GROUP], " ".join("1" * n), end == "length") for i, (end, n) in enumerate(ends)]
    assert {row.times for row in step.cache.rows} == {Times(started=5.0, generate_s=7.0, grade_s=11.0)}
    assert {row.engine for row in step.cache.rows} == {3}
    assert [row.prompt_ids for row in step.cache.rows] == [(n,) for n in range(3) for _ in range(GROUP)]
    sampling = step.rollout.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (2048, 0.7, 0.9)
    assert sampling.stop == ("</answer>",)
    assert metrics["sampled_tokens"] == 3 * 4 + 45
    assert metrics["response_length"] == pytest.approx(57 / 12)
    shares = {"truncated": 3, "verifier_failures": 2, "unparsable": 4, "no_answer": 1, "success_rate": 2}
    assert {name: metrics[name] * 12 for name in shares} == pytest.approx(shares)


@pytest.mark.parametrize(("max_lag", "seconds"), [(0, 8), (1, 6)])
def test_tokens_a_second_are_over_sampling_and_training_or_the_longer_of_both_where_they_overlap(
    monkeypatch: pytest.MonkeyPatch, max_lag: int, seconds: int
) -> None:
    step = make(lambda problem, n: False, dynamic_sampling="false", sampling_rounds=3, prompts_per_step=9)
    step.config.rollout.max_lag = max_lag
    monkeypatch.setattr(time, "perf_counter", itertools.count().__next__)  # each stage takes a second
    _, metrics = run(step, 0, 0, 0)
    assert (metrics["seconds_generate"], metrics["seconds_grade"]) == (3, 3)
    assert (metrics["seconds_logprobs"], metrics["seconds_update"]) == (1, 1)
    assert metrics["tokens_per_s"] == pytest.approx(9 * GROUP / seconds)


@pytest.mark.parametrize("sleep", [False, True])
def test_engines_on_the_trainers_gpus_sleep_while_it_trains(sleep: bool) -> None:
    step, order = make(first_only, old_logprobs="trainer", updates_per_step=1), list[str]()
    step.config.rollout.sleep = sleep
    for owner, name in ((step.rollout, "sleep"), (step.actor, "logprobs"), (step.actor, "update")):
        plain = getattr(owner, name, lambda: None)
        setattr(owner, name, lambda *args, name=name, plain=plain: order.append(name) or plain(*args))
    run(step, 0, 0, 0)
    assert order == ["sleep"] * sleep + ["logprobs", "update"]


def test_too_many_answers_that_cannot_be_read_stop_the_run_where_that_is_asked() -> None:
    step = make(first_only)
    step.rewards.grade = lambda items: [
        Verdict(n == 4, "unparsable" if n < 4 else "wrong" if n > 4 else "correct") for n, _ in enumerate(items)
    ]
    batch = step.collect(0, 3, 0)
    assert step.train(0, 3, batch, version=1)["unparsable"] == pytest.approx(1 / 3)  # off by default
    step.config.reward.max_unparsable_share = 4 / 12  # as many are allowed
    step.train(0, 3, batch, version=1)
    step.config.reward.max_unparsable_share = 0.33
    ends = batch.sampled[0].trajectories[0].response_ids[0]
    with pytest.raises(UnparsableError, match=rf"step 3: 33.3% .*max_unparsable_share=0.33 .*boxed.*r1_zero.*'{ends}'"):
        step.train(0, 3, batch, version=1)


def test_without_dynamic_sampling_every_group_is_trained_on() -> None:
    step = make(lambda problem, n: False, dynamic_sampling="false", prompts_per_step=3)
    _, metrics = run(step, 0, 0, 0)
    assert metrics["groups_kept"] == 3
    assert sum(len(batch) for batch in step.actor.batches) == 3 * GROUP


def test_overlong_responses_can_be_left_out_of_the_loss() -> None:
    step = make(first_only, overlong_filter="true", updates_per_step=1, overlong_buffer=0)
    cut = [Completion((n,), (-0.5,), "length" if n % 2 else "stop", ((1, 1),)) for n in range(3 * GROUP)]
    step.rollout.answer = lambda requests: cut  # type: ignore[method-assign]
    run(step, 0, 0, 0)
    (batch,) = step.actor.batches
    assert len(batch) == GROUP  # half of two groups
    assert {row.trajectory.finish_reason for row in batch} == {"stop"}
    assert len(step.cache.rows) == 3 * GROUP


@pytest.mark.parametrize(
    ("settings", "old", "reference"),
    [
        ({}, (-0.5,), ()),
        ({"old_logprobs": "trainer"}, (-3.0,), ()),
        ({"kl_coefficient": 0.1}, (-0.5,), (-7.0,)),
    ],
)
def test_logprobs_are_those_of_engine_trainer_and_reference(
    settings: dict[str, object], old: tuple[float], reference: tuple[float]
) -> None:
    step = make(first_only, **settings)
    run(step, 0, 0, 0)
    rows = [row for batch in step.actor.batches for row in batch]
    assert {(row.old_logprobs, row.reference_logprobs) for row in rows} == {(old, reference)}


def test_replay_records_a_forward_pass_and_keeps_the_engines_logprobs() -> None:
    step = make(first_only)
    step.config.actor.routing_replay = "first_forward"
    asked: list[int] = []
    of_trainer = step.actor.logprobs
    step.actor.logprobs = lambda batch, of_reference: asked.append(len(batch)) or of_trainer(batch, of_reference)  # type: ignore[method-assign]
    _, metrics = run(step, 0, 0, 0)
    assert asked == [2 * GROUP]
    assert {row.old_logprobs for batch in step.actor.batches for row in batch} == {(-0.5,)}
    assert "seconds_logprobs" in metrics


class SlowForP0(SeedEcho):
    """Aborts the groups of p0 after two tokens while it may; what is asked again goes on to the end."""

    def answer(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        return [self._one(request) for request in requests]

    def _one(self, request: SampleRequest) -> Completion:
        version = len(self.requests)
        if request.partial is not None:
            ids, runs = request.partial.response_ids, request.partial.weight_versions
            return Completion((*ids, 9), (-0.5,) * (len(ids) + 1), "stop", (*runs, (version, 1)))
        if request.prompt_ids == (0,) and request.seed % 2:
            return Completion((request.seed, 8), (-0.5,) * 2, "abort", ((version, 2),))
        return Completion((request.seed,), (-0.5,), "stop", ((version, 1),))


def test_the_slowest_groups_go_on_in_the_next_step_from_where_they_were() -> None:
    step = make(first_only, sampled_per_step=2, prompts_per_step=1, sampling_rounds=1)
    step.config.rollout.overprovision = 0.5
    rollout = step.rollout = SlowForP0()
    first = step.collect(0, 0, 0)
    assert first.position == 3  # 1.5 times what is wanted
    assert rollout.enough == [2]  # groups: then the engines may give up the rest
    aborted = [r for r in rollout.requests if r.prompt_ids == (0,) and r.seed % 2]
    assert aborted
    assert "p0" not in {group.problem_id for group in first.sampled}
    asked = len(rollout.requests)
    second = step.collect(0, 1, first.position)
    assert second.position == 5  # one group less is drawn
    again = [r for r in rollout.requests[asked:] if r.partial is not None]
    assert [r.seed for r in again] == [r.seed for r in aborted]  # what was finished is not asked again
    (group,) = [g for g in second.sampled if g.problem_id == "p0"][:1]
    assert [t.sample for t in group.trajectories] == list(range(GROUP))
    assert {len(t.weight_versions) for t in group.trajectories} == {1, 2}
    assert all(len(t.response_ids) == sum(n for _, n in t.weight_versions) for t in group.trajectories)
    finished = len(rollout.requests) - len(aborted)
    assert sum(step.rewards.seen.values()) == finished  # each was graded once, and only whole


def test_a_phase_begins_with_groups_of_its_own() -> None:
    """As it does in a run that was killed between the two."""
    step = make(first_only, sampled_per_step=2, prompts_per_step=1, sampling_rounds=1)
    step.config.rollout.overprovision = 0.5
    step.rollout = SlowForP0()
    position = step.collect(0, 0, 0).position
    step.feed(1, 0, 1, position)
    assert step.collect(1, 0, position).position == position + 3
    assert not any(request.partial for request in step.rollout.requests)


def test_a_feed_draws_on_from_batch_to_batch_as_far_ahead_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make(first_only)
    step.config.rollout.max_lag, step.config.rollout.partial = 3, True
    monkeypatch.setattr(rl_step, "Feed", lambda *args: args)
    collect, rollout, *what = step.feed(0, 2, 9, 4)
    assert (rollout, what) == (step.rollout, [2, 9, 3, True])
    assert [collect(number).position for number in (2, 3)] == [7, 10]


def test_a_problem_that_is_drawn_twice_in_a_row_is_two_groups() -> None:
    class One(FixedPrompts):
        def draw(self, position: int, count: int, weights: Sequence[float] | None = None) -> tuple[list[Prompt], int]:
            return [Prompt(PROBLEMS[0], (0,))] * count, position + count

    step = make(first_only)
    step.prompts = One()
    step.collect(0, 0, 0)
    assert [request.group for request in step.rollout.requests] == [n for n in range(3) for _ in range(GROUP)]


class LateToEnd(SeedEcho):
    """Aborts p0 once after so many tokens of a response, the last of them perhaps the one that ends it, as SGLang does.

    Looks for stops in the tokens that it samples itself, as engines do.
    """

    whole, versions = (5, 6, 1, 1), ((1, 2), (2, 2))

    def __init__(self, tokens: int, left: Completion | None) -> None:
        """left: what is to be left of that answer to go on from."""
        super().__init__()
        self.tokens, self.left = tokens, left

    def answer(self, requests: Sequence[SampleRequest]) -> list[Completion]:
        return [self._one(request) for request in requests]

    def _one(self, request: SampleRequest) -> Completion:
        if request.prompt_ids == (0,):
            if len(self.requests) <= 3 * GROUP:
                versions = ((1, 2), (2, self.tokens - 2))
                return Completion(self.whole[: self.tokens], (-0.5,) * self.tokens, "abort", versions)
            assert request.partial == self.left
        return Completion(self.whole, (-0.5,) * 4, "stop", self.versions)


LEFT = {kept: Completion((5, 6, 1)[:kept], (-0.5,) * kept, "abort", ((1, kept),)) for kept in (1, 2)}
LEFT[3] = Completion((5, 6, 1), (-0.5,) * 3, "abort", ((1, 2), (2, 1)))


@pytest.mark.parametrize(
    ("stop", "tokens", "left"),
    [
        ((), 4, LEFT[3]),  # the last one may be the end token, or that of max_tokens
        ((), 3, LEFT[2]),
        (("\n\n",), 4, LEFT[2]),  # a whole stop string
        (("é",), 3, LEFT[1]),  # perhaps the beginning of one, a token a byte
        (("stop",), 4, None),
    ],
)
def test_a_response_goes_on_from_before_what_may_have_ended_it(
    stop: tuple[str, ...], tokens: int, left: Completion | None
) -> None:
    step = make(first_only, sampled_per_step=2, prompts_per_step=1, sampling_rounds=1)
    step.config.rollout.overprovision = 0.5
    step.stop = stop
    rollout = step.rollout = LateToEnd(tokens, left)
    step.collect(0, 1, step.collect(0, 0, 0).position)
    again = rollout.requests[3 * GROUP :]
    assert sum(request.prompt_ids == (0,) for request in again) == GROUP


class GroupByGroup(SeedEcho):
    """Generates a group after the other, the last one first, each once `may_go_on` lets it."""

    def __init__(self, may_go_on: Callable[[int], None] = lambda groups: None) -> None:
        super().__init__()
        self.may_go_on = may_go_on

    def submit(
        self, requests: Sequence[SampleRequest], sampling: Sampling, enough: int | None, answered: Answered
    ) -> Future:
        completions = self.answer(requests)
        for groups, first in enumerate(reversed(range(0, len(requests), GROUP))):
            self.may_go_on(groups)
            answered(range(first, first + GROUP), completions[first : first + GROUP])
        future: Future = Future()
        future.set_result(completions)
        return future


class EvenSeedsAreRight:
    """Verdicts that depend on the answer alone."""

    def __init__(self) -> None:
        self.graded = threading.Semaphore(0)

    def grade(self, items: Iterable[tuple[Problem, str, bool]]) -> list[Verdict]:
        return list(self._each(items))

    def _each(self, items: Iterable[tuple[Problem, str, bool]]) -> Iterator[Verdict]:
        for _, text, truncated in items:
            yield Verdict(int(text) % 2 == 0, "truncated" if truncated else "", seconds=float(text))
            self.graded.release()


def test_a_group_is_graded_while_the_next_one_is_generated() -> None:
    """The engine waits for the verdicts on the groups before: it would wait forever if grading came at the end."""
    rewards = EvenSeedsAreRight()

    def until_graded(groups: int) -> None:
        for _ in range(GROUP if groups else 0):
            assert rewards.graded.acquire(timeout=60), "the group before is not graded while this one is generated"

    step = make(first_only)
    step.rollout, step.rewards = GroupByGroup(until_graded), rewards
    assert len(step.collect(0, 0, 0).sampled) == 3


def test_what_comes_when_changes_no_trajectory() -> None:
    in_order, reverse = make(first_only), make(first_only)
    in_order.rewards, reverse.rewards = EvenSeedsAreRight(), EvenSeedsAreRight()
    reverse.rollout = GroupByGroup()
    sampled = in_order.collect(0, 0, 0).sampled
    assert [t.correct for group in sampled for t in group.trajectories] == [
        t.response_ids[0] % 2 == 0 for group in sampled for t in group.trajectories
    ]
    assert reverse.collect(0, 0, 0).sampled == sampled


def assert_grading_has_ended() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("grading"):
            thread.join(60)
            assert not thread.is_alive()


@pytest.mark.parametrize("when", ["first", "last"])
def test_what_a_grader_raises_reaches_the_caller_and_leaves_no_thread(when: str) -> None:
    class Failing:
        def grade(self, items: Iterable[tuple[Problem, str, bool]]) -> list[Verdict]:
            for _ in items:
                if when == "first":
                    break
            raise Fault("no verdicts today")

    step = make(first_only)
    step.rollout, step.rewards = GroupByGroup(), Failing()
    with pytest.raises(Fault, match="no verdicts today"):
        step.collect(0, 0, 0)
    assert_grading_has_ended()


def test_when_the_engines_fail_grading_ends_too() -> None:
    def fail(groups: int) -> None:
        if groups:
            raise Fault("no engine is left")

    step = make(first_only)
    step.rollout, step.rewards = GroupByGroup(fail), EvenSeedsAreRight()
    with pytest.raises(Fault, match="no engine is left"):
        step.collect(0, 0, 0)
    assert_grading_has_ended()


def test_samples_of_older_weights_are_told_and_not_held_to_the_gate() -> None:
    step = make(first_only, RecordingActor(mismatch=0.02))
    batch = step.collect(0, 0, 0)
    with pytest.raises(MismatchError):
        step.train(0, 0, batch, version=1)
    metrics = step.train(0, 0, batch, version=3)
    assert (metrics["lag_mean"], metrics["lag_max"], metrics["spanning_share"]) == (2.0, 2.0, 0.0)


def test_a_trajectory_lags_by_its_oldest_token() -> None:
    step = make(first_only)
    versions = [((1, 1), (3, 1)), ((2, 2),), ((3, 2),), ((3, 2),)] * 2 + [((0, 2),)] * 4  # the last group is surplus
    sampled = [Completion((1, 2), (-0.5, -0.5), "stop", runs) for runs in versions]
    step.rollout.answer = lambda requests: sampled  # type: ignore[method-assign]
    metrics = step.train(0, 0, step.collect(0, 0, 0), version=3)
    assert (metrics["lag_mean"], metrics["lag_max"], metrics["spanning_share"]) == (0.75, 2.0, 0.25)


def test_the_curriculum_is_told_how_each_problem_went_and_asked_by_what_no_lag_can_change() -> None:
    told: list[tuple[str, object]] = []

    class Recorder:
        def begin(self, visits: Iterable[tuple[str, Visit]]) -> None:
            told.append(("begin", list(visits)))

        def observe(self, visits: Iterable[tuple[str, Visit]]) -> None:
            told.append(("observe", list(visits)))

        def weights(self, iteration: int, step: int) -> list[float]:
            told.append(("weights", (iteration, step)))
            return [1.0] * len(PROBLEMS)

    # p0 to p5 and p0 again: its second group has no right answer
    step = make(lambda problem, n: n < int(problem[1]) % 3 + 1, sampled_per_step=7, prompts_per_step=7)
    earlier = [("p3", Visit(1, 4, 4, 2))]
    step.curriculum, step.cache.visits = Recorder(), lambda: earlier
    step.config.rollout.max_lag = 2
    step.config.algorithm.sampling_rounds = 1
    step.feed(2, 5, 9, 0)
    run(step, 2, 5, 0)
    samples = {f"p{n}": 2 * GROUP if n == 0 else GROUP for n in range(6)}
    visits = [(name, Visit(2, 5, count, int(name[1]) % 3 + 1)) for name, count in samples.items()]
    assert told == [("begin", earlier), ("weights", (2, 3)), ("observe", visits)]
