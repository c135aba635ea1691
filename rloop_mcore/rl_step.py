"""One step of exploration: sample groups, score them, cache them all, update on the informative ones."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rloop_mcore.algorithm.advantage import group_advantages
from rloop_mcore.algorithm.dynamic_sampling import informative_groups
from rloop_mcore.algorithm.minibatch import mini_batches
from rloop_mcore.algorithm.overlong import overlong_penalty
from rloop_mcore.algorithm.seeds import derive_seed
from rloop_mcore.config import Config
from rloop_mcore.errors import Fault
from rloop_mcore.protocols import Actor, Cache, Prompts, Rewards, Rollout
from rloop_mcore.types import Experience, Group, Prompt, SampleRequest, Sampling, Trajectory

log = logging.getLogger(__name__)

_MISMATCH_GATE_FP32, _MISMATCH_GATE = 1e-4, 5.0


class MismatchError(Fault):
    """The trainer and the engine disagree about the logprobs of what the engine sampled."""


@dataclass
class Stopwatch:
    """Seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        key = f"seconds_{stage}"
        self.seconds[key] = self.seconds.get(key, 0.0) + time.perf_counter() - start


@dataclass
class RLStep:
    """DAPO's step on whatever policy actor and rollout hold."""

    config: Config
    actor: Actor
    rollout: Rollout
    rewards: Rewards
    prompts: Prompts
    cache: Cache
    stop: tuple[str, ...] = ()  # strings at which a response ends, beside the end token

    def run(self, iteration: int, step: int, position: int) -> tuple[int, dict[str, float]]:
        """Sample, cache, update. `position` counts the prompts drawn so far in the run.

        Returns the new position and the metrics of the step. Raises MismatchError past `rollout.mismatch_gate`.
        """
        algorithm, watch = self.config.algorithm, Stopwatch()
        sampled: list[Group] = []
        kept: list[Group] = []
        visits: Counter[str] = Counter()
        for _ in range(algorithm.sampling_rounds):
            prompts = self.prompts.draw(position, algorithm.sampled_per_step)
            position += len(prompts)
            groups = self.sample(iteration, step, prompts, visits, watch)
            self.cache.append([trajectory for group in groups for trajectory in group.trajectories])
            sampled += groups
            kept = informative_groups(sampled, algorithm.prompts_per_step, algorithm.dynamic_sampling)
            if len(kept) >= algorithm.prompts_per_step:
                break
        else:
            log.info("step %d: %d informative groups of %d wanted", step, len(kept), algorithm.prompts_per_step)
        metrics = self.update(iteration, step, kept, watch)
        seconds = watch.seconds | {"seconds_update": metrics.get("seconds_update", 0.0)}
        return position, metrics | _figures(sampled, kept, seconds)

    def sample(
        self, iteration: int, step: int, prompts: Sequence[Prompt], visits: Counter[str], watch: Stopwatch
    ) -> list[Group]:
        """A scored group of G trajectories for each prompt; `visits` counts a problem's earlier groups in this step."""
        algorithm, rollout, run_seed = self.config.algorithm, self.config.rollout, self.config.run.seed
        size = algorithm.group_size
        rows: list[tuple[Prompt, int]] = []
        for prompt in prompts:
            first = visits[prompt.problem.id] * size
            visits[prompt.problem.id] += 1
            rows += [(prompt, first + j) for j in range(size)]
        requests = [
            SampleRequest(prompt.ids, derive_seed(run_seed, "rollout", iteration, step, prompt.problem.id, sample))
            for prompt, sample in rows
        ]
        with watch("generate"):
            sampling = Sampling(rollout.max_tokens, rollout.temperature, rollout.top_p, self.stop)
            completions = self.rollout.generate(requests, sampling)
        with watch("grade"):
            verdicts = self.rewards.grade(
                [
                    (prompt.problem, self.prompts.decode(completion.response_ids), completion.finish_reason == "length")
                    for (prompt, _), completion in zip(rows, completions, strict=True)
                ]
            )
        trajectories = [
            Trajectory(
                iteration=iteration,
                step=step,
                problem_id=prompt.problem.id,
                sample=sample,
                prompt_ids=prompt.ids,
                response_ids=completion.response_ids,
                logprobs=completion.logprobs,
                finish_reason=completion.finish_reason,
                weight_versions=completion.weight_versions,
                correct=verdict.correct,
                reward=float(verdict.correct)
                + overlong_penalty(len(completion.response_ids), rollout.max_tokens, algorithm.overlong_buffer),
                reason=verdict.reason,
            )
            for (prompt, sample), completion, verdict in zip(rows, completions, verdicts, strict=True)
        ]
        return [
            Group(prompt.problem.id, tuple(trajectories[i * size : (i + 1) * size])) for i, prompt in enumerate(prompts)
        ]

    def update(self, iteration: int, step: int, groups: Sequence[Group], watch: Stopwatch) -> dict[str, float]:
        """`updates_per_step` optimizer updates; the first is on-policy and is held to the mismatch gate."""
        with watch("logprobs"):
            experiences = self.experiences(groups)
        if not experiences:
            return {"skipped": float(self.config.algorithm.updates_per_step)}
        seed = derive_seed(self.config.run.seed, "minibatch", iteration, step)
        results: list[dict[str, float]] = []
        for rows in mini_batches(len(experiences), self.config.algorithm.updates_per_step, seed):
            results.append(self.actor.update([experiences[i] for i in rows]))
            if len(results) == 1:
                self._check_mismatch(step, results[0])
        metrics = {key: sum(r[key] for r in results) / len(results) for key in results[0]}
        for key in ("mismatch_mean", "mismatch_max", "ratio_mean", "ratio_max"):
            metrics[key] = results[0][key]
        for key in ("skipped", "tokens", "seconds_update"):
            metrics[key] = sum(r[key] for r in results)
        return metrics | {"lr": results[-1]["lr"], "grad_norm_max": max(r["grad_norm"] for r in results)}

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

    def _check_mismatch(self, step: int, metrics: dict[str, float]) -> None:
        rollout, largest, mean = self.config.rollout, metrics["mismatch_max"], metrics["mismatch_mean"]
        gate = rollout.mismatch_gate
        if gate is None:
            gate = _MISMATCH_GATE_FP32 if self.config.precision == "fp32" else _MISMATCH_GATE
        if not (largest <= gate and mean <= rollout.mismatch_mean_gate):
            raise MismatchError(
                f"step {step}: trainer and engine logprobs of the same tokens differ by up to {largest:.3g} (mean "
                f"{mean:.3g}), over rollout.mismatch_gate={gate} or rollout.mismatch_mean_gate="
                f"{rollout.mismatch_mean_gate}: the engine does not hold the trainer's weights, or computes in another "
                "precision."
            )


def _figures(sampled: Sequence[Group], kept: Sequence[Group], seconds: dict[str, float]) -> dict[str, float]:
    """What was sampled (kept or not), and where the time went."""
    trajectories = [trajectory for group in sampled for trajectory in group.trajectories]
    count = len(trajectories)
    tokens = sum(len(t.response_ids) for t in trajectories)
    return {
        "reward_mean": sum(t.reward for t in trajectories) / count,
        "success_rate": sum(t.correct for t in trajectories) / count,
        "response_length": tokens / count,
        "truncated": sum(t.finish_reason == "length" for t in trajectories) / count,
        "verifier_failures": sum(t.reason in ("timeout", "crashed") for t in trajectories) / count,
        "groups_sampled": float(len(sampled)),
        "groups_kept": float(len(kept)),
        "tokens_per_s": tokens / max(sum(seconds.values()), 1e-9),
        **seconds,
    }
