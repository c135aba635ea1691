"""One step of exploration: sample groups, score them, cache them all, update on the informative ones."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from rloop_mcore.algorithm.advantage import group_advantages
from rloop_mcore.algorithm.dynamic_sampling import informative_groups
from rloop_mcore.algorithm.minibatch import mini_batches
from rloop_mcore.algorithm.overlong import overlong_penalty
from rloop_mcore.algorithm.seeds import derive_seed
from rloop_mcore.algorithm.verdict_reward import verdict_reward
from rloop_mcore.config import Config
from rloop_mcore.errors import Fault
from rloop_mcore.feed import Feed
from rloop_mcore.grading import Grading
from rloop_mcore.platform.heartbeat import beat
from rloop_mcore.protocols import Actor, Cache, Curriculum, Prompts, Rewards, Rollout
from rloop_mcore.timeline import Timeline
from rloop_mcore.types import (
    Completion,
    Experience,
    Group,
    Prompt,
    SampleRequest,
    Sampling,
    Times,
    Trajectory,
    Verdict,
    Visit,
)

log = logging.getLogger(__name__)

_MISMATCH_GATE_FP32, _MISMATCH_GATE = 1e-4, 5.0
_OF_UPDATES = {"loss", "grad_norm", "padding_share"}  # metrics of an update as a whole; others are of its tokens


class MismatchError(Fault):
    """The trainer and the engine disagree about the logprobs of what the engine sampled."""


class UnparsableError(Fault):
    """So many answers can't be read that their rewards would teach nothing true."""


@dataclass
class Stopwatch:
    """Seconds by stage; each stage is a span of the timeline too."""

    timeline: Timeline
    step: int
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str, track: str = "trainer") -> Iterator[None]:
        start = time.perf_counter()
        with self.timeline.span(track, stage, step=self.step):
            yield
        key = f"seconds_{stage}"
        self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Batch:
    """What a step sampled: all groups, and those that the update gets."""

    sampled: list[Group]
    kept: list[Group]
    position: int  # place of the endless order from which the next batch is drawn
    seconds: dict[str, float]


@dataclass
class _Asked:
    """A group that the engines are asked for. A completion may be missing, or not finished: it has no verdict then."""

    prompt: Prompt
    seeds: list[int]
    completions: list[Completion | None]
    verdicts: list[Verdict | None]
    first: int = 0  # number of its first sample among those of the problem in the step

    @property
    def unfinished(self) -> list[int]:
        return [i for i, verdict in enumerate(self.verdicts) if verdict is None]


@dataclass
class RLStep:
    """DAPO's step on whatever policy actor and rollout hold: `collect` a batch, then `train` on it."""

    config: Config
    actor: Actor
    rollout: Rollout
    rewards: Rewards
    prompts: Prompts
    cache: Cache
    stop: tuple[str, ...] = ()  # strings at which a response ends, beside the end token
    timeline: Timeline = field(default_factory=Timeline)
    curriculum: Curriculum | None = None
    _carried: list[_Asked] = field(default_factory=list, init=False)  # aborted as too slow: for the next round

    def feed(self, iteration: int, first: int, last: int, position: int) -> Feed[Batch]:
        """The batches of steps `first` .. `last` - 1; `position`: the place of the endless order to draw from."""
        rollout, drawn = self.config.rollout, position
        self._carried = []
        if self.curriculum is not None:  # what is sealed are the steps before `first`, in a resumed run or not
            self.curriculum.begin(self.cache.visits())

        def collect(step: int) -> Batch:
            nonlocal drawn
            batch = self.collect(iteration, step, drawn)
            drawn = batch.position
            return batch

        return Feed(collect, self.rollout, first, last, rollout.max_lag, rollout.partial)

    def collect(self, iteration: int, step: int, position: int) -> Batch:
        """Sample and grade groups until enough are informative, or for `sampling_rounds`. Touches no weights."""
        algorithm, watch = self.config.algorithm, Stopwatch(self.timeline, step)
        sampled: list[Group] = []
        kept: list[Group] = []
        visits: Counter[str] = Counter()
        weights = None
        if self.curriculum is not None:
            # The last steps before this one may not be trained on yet, or may be: neither way do they count.
            weights = self.curriculum.weights(iteration, step - self.config.rollout.max_lag)
        for _ in range(algorithm.sampling_rounds):
            asked = math.ceil(algorithm.sampled_per_step * (1 + self.config.rollout.overprovision))
            prompts, position = self.prompts.draw(position, asked - len(self._carried), weights)
            sampled += self.sample(iteration, step, prompts, visits, watch)
            kept = informative_groups(sampled, algorithm.prompts_per_step, algorithm.dynamic_sampling)
            if len(kept) >= algorithm.prompts_per_step:
                break
        else:
            log.info("step %d: %d informative groups of %d wanted", step, len(kept), algorithm.prompts_per_step)
        return Batch(sampled, kept, position, watch.seconds)

    def train(self, iteration: int, step: int, batch: Batch, version: int) -> dict[str, float]:
        """Cache the batch, update on it; `version`: of the weights that the actor holds. Returns the step's metrics.

        Raises UnparsableError past `reward.max_unparsable_share` and MismatchError past `rollout.mismatch_gate`.
        """
        watch, figures = Stopwatch(self.timeline, step), _figures(batch)
        self._check_unparsable(step, batch, figures["unparsable"])
        self.cache.append([trajectory for group in batch.sampled for trajectory in group.trajectories])
        if self.curriculum is not None:
            self.curriculum.observe(_visits(iteration, step, batch.sampled))
        lag = _lag(batch.kept, version)
        if self.config.rollout.sleep:
            with watch("sleep"):
                self.rollout.sleep()
        metrics = self.update(iteration, step, batch.kept, watch, stale=lag["lag_max"] > 0)
        # What overlaps takes as long as the longer of the two.
        both = sum(batch.seconds.values()), sum(watch.seconds.values())
        seconds = max(both) if self.config.rollout.max_lag else sum(both)
        throughput = {"tokens_per_s": figures["sampled_tokens"] / max(seconds, 1e-9)}
        return metrics | lag | figures | throughput | batch.seconds | watch.seconds

    def sample(
        self, iteration: int, step: int, prompts: Sequence[Prompt], visits: Counter[str], watch: Stopwatch
    ) -> list[Group]:
        """A scored group of G trajectories for each prompt; `visits` counts a problem's earlier groups in this step.

        Answers are graded as they come: `seconds_grade` is what grading takes beyond generation.
        With `rollout.overprovision` the slowest groups are aborted once there are `sampled_per_step`; they go on from
        where they were in the next round.
        """
        algorithm, rollout, run_seed = self.config.algorithm, self.config.rollout, self.config.run.seed
        size = algorithm.group_size
        wanted = self._carried + [_Asked(prompt, [], [None] * size, [None] * size) for prompt in prompts]
        for group in wanted:
            name = group.prompt.problem.id
            group.first = visits[name] * size
            visits[name] += 1
            if not group.seeds:
                numbers = range(group.first, group.first + size)
                group.seeds = [derive_seed(run_seed, "rollout", iteration, step, name, number) for number in numbers]
        open_rows = [(group, i) for group in wanted for i in group.unfinished]
        requests = [
            SampleRequest(group.prompt.ids, group.seeds[i], _begun(group.completions[i], self.stop), number)
            for number, group in enumerate(wanted)
            for i in group.unfinished
        ]
        sampling = Sampling(rollout.max_tokens, rollout.temperature, rollout.top_p, self.stop)
        enough = algorithm.sampled_per_step if rollout.overprovision > 0 else None
        with Grading(self.rewards, [g.prompt.problem for g, _ in open_rows], self.prompts.decode) as grading:
            with watch("generate", "engines"):
                completions = self.rollout.submit(requests, sampling, enough, grading.take).result()
            with watch("grade", "rewards"):
                verdicts = grading.verdicts()
        for row, ((group, i), completion) in enumerate(zip(open_rows, completions, strict=True)):
            group.completions[i], group.verdicts[i] = completion, verdicts.get(row)
        self._carried = [group for group in wanted if group.unfinished]
        return [self._scored(iteration, step, group) for group in wanted if not group.unfinished]

    def _scored(self, iteration: int, step: int, group: _Asked) -> Group:
        """The trajectories of a group that is whole."""
        algorithm, rollout, reward = self.config.algorithm, self.config.rollout, self.config.reward
        trajectories = [
            Trajectory(
                iteration=iteration,
                step=step,
                problem_id=group.prompt.problem.id,
                sample=group.first + i,
                prompt_ids=group.prompt.ids,
                response_ids=completion.response_ids,
                logprobs=completion.logprobs,
                finish_reason=completion.finish_reason,
                weight_versions=completion.weight_versions,
                correct=verdict.correct,
                reward=verdict_reward(verdict, reward.correct, reward.wrong, reward.format_penalty)
                + overlong_penalty(len(completion.response_ids), rollout.max_tokens, algorithm.overlong_buffer),
                reason=verdict.reason,
                group=group.first // algorithm.group_size,
                engine=completion.engine,
                times=Times(completion.started, completion.seconds, verdict.seconds),
            )
            for i, (completion, verdict) in enumerate(zip(group.completions, group.verdicts, strict=True))
            if completion is not None and verdict is not None
        ]
        return Group(group.prompt.problem.id, tuple(trajectories))

    def update(
        self, iteration: int, step: int, groups: Sequence[Group], watch: Stopwatch, stale: bool
    ) -> dict[str, float]:
        """`updates_per_step` optimizer updates. Returns means over all their tokens, of `_OF_UPDATES` over the updates.

        The first is held to the mismatch gate, unless the samples are `stale`: of older weights than the trainer's.
        """
        updates = self.config.algorithm.updates_per_step
        with watch("logprobs"):
            experiences = self.experiences(groups) if updates else []
        if not experiences:
            return {"skipped": float(updates), "updates": 0.0}
        seed = derive_seed(self.config.run.seed, "minibatch", iteration, step)
        results: list[dict[str, float]] = []
        with watch("update"):
            for rows in mini_batches(len(experiences), updates, seed):
                results.append(self.actor.update([experiences[i] for i in rows]))
                beat()
                if len(results) == 1 and not stale and not _is_nothing(results[0]):
                    self._check_mismatch(step, results[0])
        tokens = max(sum(r["tokens"] for r in results), 1.0)
        metrics = {key: sum(r[key] * r["tokens"] / tokens for r in results) for key in results[0]}
        for key in _OF_UPDATES & metrics.keys():
            metrics[key] = sum(r[key] for r in results) / len(results)
        for key in ("mismatch_mean", "mismatch_max", "mismatch_k3", "ratio_mean", "ratio_max"):
            metrics[key] = results[0][key]
        for key in ("skipped", "tokens"):
            metrics[key] = sum(r[key] for r in results)
        norm = max((r["grad_norm"] for r in results), key=lambda norm: math.inf if math.isnan(norm) else norm)
        return metrics | {"updates": float(len(results)), "lr": results[-1]["lr"], "grad_norm_max": norm}

    def experiences(self, groups: Sequence[Group]) -> list[Experience]:
        """The trajectories of the groups with their advantages and the logprobs they are compared with."""
        algorithm = self.config.algorithm
        trajectories: list[Trajectory] = []
        advantages: list[float] = []
        for group in groups:
            of_group = group_advantages([t.reward for t in group.trajectories], algorithm.advantage)
            for trajectory, advantage in zip(group.trajectories, of_group, strict=True):
                if not (algorithm.overlong_filter and trajectory.finish_reason == "length"):
                    trajectories.append(trajectory)
                    advantages.append(advantage)
        if not trajectories:
            return []
        old: list[tuple[float, ...]] = [t.logprobs for t in trajectories]
        reference: list[tuple[float, ...]] = [()] * len(trajectories)
        if algorithm.old_logprobs == "trainer" or self.config.actor.routing_replay != "none":
            first = self.actor.logprobs(trajectories, False)
            old = first if algorithm.old_logprobs == "trainer" else old
        if algorithm.kl_coefficient > 0:
            reference = self.actor.logprobs(trajectories, True)
        return [Experience(*row) for row in zip(trajectories, advantages, old, reference, strict=True)]

    def _check_unparsable(self, step: int, batch: Batch, share: float) -> None:
        reward, template = self.config.reward, self.config.data.template
        if share <= reward.max_unparsable_share:
            return
        trajectories = (trajectory for group in batch.sampled for trajectory in group.trajectories)
        text = next(self.prompts.decode(t.response_ids) for t in trajectories if t.reason == "unparsable")
        raise UnparsableError(
            f"step {step}: {share:.1%} of the responses hold an answer that cannot be read, more than "
            f"reward.max_unparsable_share={reward.max_unparsable_share:g} allows: does "
            f"reward.answer_format={reward.answer_format} fit data.template={template}? The first ends {text[-200:]!r}."
        )

    def _check_mismatch(self, step: int, metrics: dict[str, float]) -> None:
        rollout, largest, mean = self.config.rollout, metrics["mismatch_max"], metrics["mismatch_mean"]
        gate = rollout.mismatch_gate
        if gate is None:
            gate = _MISMATCH_GATE_FP32 if self.config.precision == "fp32" else _MISMATCH_GATE
        if gate / 2 < largest <= gate:
            log.warning("step %d: trainer and engine logprobs differ by %.3g; the gate is %.3g", step, largest, gate)
        if not (largest <= gate and mean <= rollout.mismatch_mean_gate):
            raise MismatchError(
                f"step {step}: trainer and engine logprobs of the same tokens differ by up to {largest:.3g} (mean "
                f"{mean:.3g}), over rollout.mismatch_gate={gate} or rollout.mismatch_mean_gate="
                f"{rollout.mismatch_mean_gate}: the engine does not hold the trainer's weights, or computes in another "
                "precision."
            )


def _is_nothing(result: dict[str, float]) -> bool:
    """Whether an update was skipped because the trainer's logprobs are NaN: that is for the guard to judge."""
    return result["skipped"] > 0 and math.isnan(result["mismatch_max"])


def _begun(completion: Completion | None, stop: Sequence[str]) -> Completion | None:
    """What an aborted answer leaves to go on from.

    Its last tokens are sampled anew: SGLang takes one more after it was told to abort, which may be the end token, the
    last of a stop string (a token a byte) or of `rollout.max_tokens`, and answers "abort" all the same. Nor would it
    look for a stop string that began before the tokens that it samples from there on.
    """
    if completion is None:
        return None
    kept = len(completion.response_ids) - max([1, *(len(text.encode()) for text in stop)])
    if kept <= 0:
        return None
    runs, left = [], kept
    for version, tokens in completion.weight_versions:
        if left > 0:
            runs.append((version, min(tokens, left)))
        left -= tokens
    ids, logprobs = completion.response_ids[:kept], completion.logprobs[:kept]
    return replace(completion, response_ids=ids, logprobs=logprobs, weight_versions=tuple(runs))


def _visits(iteration: int, step: int, groups: Sequence[Group]) -> list[tuple[str, Visit]]:
    samples: Counter[str] = Counter()
    successes: Counter[str] = Counter()
    for group in groups:
        samples[group.problem_id] += len(group.trajectories)
        successes[group.problem_id] += sum(trajectory.correct for trajectory in group.trajectories)
    return [(name, Visit(iteration, step, count, successes[name])) for name, count in samples.items()]


def _lag(groups: Sequence[Group], version: int) -> dict[str, float]:
    """How many versions behind `version` the oldest token of a trajectory is; the share of those that span several."""
    runs = [trajectory.weight_versions for group in groups for trajectory in group.trajectories]
    lags = [version - min(v for v, _ in run) for run in runs] or [0]
    spanning = sum(len(run) > 1 for run in runs) / max(len(runs), 1)
    return {"lag_mean": sum(lags) / len(lags), "lag_max": float(max(lags)), "spanning_share": spanning}


def _figures(batch: Batch) -> dict[str, float]:
    """What was sampled, kept or not."""
    trajectories = [trajectory for group in batch.sampled for trajectory in group.trajectories]
    count = max(len(trajectories), 1)
    tokens = sum(len(t.response_ids) for t in trajectories)
    return {
        "reward_mean": sum(t.reward for t in trajectories) / count,
        "success_rate": sum(t.correct for t in trajectories) / count,
        "response_length": tokens / count,
        "sampled_tokens": float(tokens),
        "truncated": sum(t.finish_reason == "length" for t in trajectories) / count,
        "verifier_failures": sum(t.reason in ("timeout", "crashed") for t in trajectories) / count,
        "unparsable": sum(t.reason == "unparsable" for t in trajectories) / count,
        "no_answer": sum(t.reason == "no_answer" for t in trajectories) / count,
        "groups_sampled": float(len(batch.sampled)),
        "groups_kept": float(len(batch.kept)),
    }
