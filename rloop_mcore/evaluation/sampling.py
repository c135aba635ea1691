"""Draw responses to the problems of an evaluation and grade them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from rloop_mcore.algorithm.seeds import derive_seed
from rloop_mcore.errors import UserError
from rloop_mcore.grading import Grading
from rloop_mcore.protocols import Rewards, Rollout
from rloop_mcore.types import Prompt, SampleRequest, Sampling, Times, Trajectory

Wanted = tuple[Prompt, int]  # a problem's sample, from 0


@dataclass(frozen=True, slots=True)
class Graded:
    """What the numbers of an evaluation need of a trajectory: 4 bytes a token, where that one has 70."""

    problem_id: str
    sample: int
    prompt_ids: tuple[int, ...]
    response_ids: array[int]
    correct: bool
    reason: str
    finish_reason: str

    @classmethod
    def of(cls, row: Trajectory) -> Graded:
        ids = array("i", row.response_ids)
        return cls(row.problem_id, row.sample, row.prompt_ids, ids, row.correct, row.reason, row.finish_reason)


@dataclass(frozen=True)
class Sampler:
    """Responses to benchmark problems, as trajectories of step 0 of iteration 0.

    A sample's seed depends on `seed`, its problem and its number alone: two checkpoints differ by their policies and
    not by their luck, and the first 8 of 32 samples are what 8 would have been.
    """

    rollout: Rollout
    rewards: Rewards
    decode: Callable[[Sequence[int]], str]
    sampling: Sampling
    seed: int
    at_once: int

    def batches(self, wanted: Sequence[Wanted]) -> Iterator[list[Trajectory]]:
        """What `draw` gives, `at_once` samples at a time: enough to fill the engines, few enough to keep and show."""
        for start in range(0, len(wanted), self.at_once):
            yield self.draw(wanted[start : start + self.at_once])

    def draw(self, wanted: Sequence[Wanted]) -> list[Trajectory]:
        """One graded response a (prompt, sample), in order."""
        requests = [
            SampleRequest(prompt.ids, derive_seed(self.seed, "evaluation", prompt.problem.id, sample))
            for prompt, sample in wanted
        ]
        with Grading(self.rewards, [prompt.problem for prompt, _ in wanted], self.decode) as grading:
            completions = self.rollout.generate(requests, self.sampling, grading.take)
            verdicts = grading.verdicts()
        return [
            Trajectory(
                iteration=0,
                step=0,
                problem_id=prompt.problem.id,
                sample=sample,
                prompt_ids=prompt.ids,
                response_ids=completion.response_ids,
                logprobs=completion.logprobs,
                finish_reason=completion.finish_reason,
                weight_versions=completion.weight_versions,
                correct=verdict.correct,
                reward=float(verdict.correct),
                reason=verdict.reason,
                engine=completion.engine,
                times=Times(completion.started, completion.seconds, verdict.seconds),
            )
            for (prompt, sample), completion, verdict in zip(wanted, completions, verdicts.values(), strict=True)
        ]


def still_wanted(prompts: Sequence[Prompt], samples: int, kept: Iterable[Graded]) -> list[Wanted]:
    """What is missing of `samples` a problem, where `kept` has been drawn before.

    Problem after problem, so that those that begin alike are decoded together. Raises UserError where a kept sample
    was drawn for another prompt than the problem's.
    """
    asked = {prompt.problem.id: prompt.ids for prompt in prompts}
    have = set()
    for row in kept:
        if asked.get(row.problem_id, row.prompt_ids) != row.prompt_ids:
            raise UserError(
                f"problem {row.problem_id!r} was sampled before with another prompt: choose another folder (--out)."
            )
        have.add((row.problem_id, row.sample))
    return [
        (prompt, sample) for prompt in prompts for sample in range(samples) if (prompt.problem.id, sample) not in have
    ]


def votes_of(
    rows: Sequence[Graded],
    prompts: Sequence[Prompt],
    rewards: Rewards,
    decode: Callable[[Sequence[int]], str],
) -> list[str]:
    """What each sample votes for, in order; "" for nothing. Equal responses to a problem are looked at once."""
    problems = {prompt.problem.id: prompt.problem for prompt in prompts}
    asked = [(row.problem_id, decode(row.response_ids), row.finish_reason == "length") for row in rows]
    distinct = list(dict.fromkeys(asked))
    votes = rewards.votes([(problems[id], text, truncated) for id, text, truncated in distinct])
    found = dict(zip(distinct, votes, strict=True))
    return [found[key] for key in asked]
