"""The words the rooms share, as plain dataclasses. No torch here."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

Key = tuple[int, int, str, int]  # of a trajectory: iteration, step, problem_id, sample

_POLICY_NAME = re.compile(r"i(?P<iteration>\d+)_(?P<phase>[a-z]+)_(?P<step>\d+)")


class PolicyName(NamedTuple):
    """What a policy, its checkpoint and its evaluation are called: "base", or by the phase's steps it was made in.

    str(PolicyName(1, "explore", 100)) is i1_explore_000100, and i1_exploit_000000 is theta_2.
    """

    iteration: int
    phase: str
    step: int

    @classmethod
    def of(cls, name: str) -> PolicyName | None:
        """From its text; None where that is no such name."""
        if name == "base":
            return cls(0, "base", 0)
        found = _POLICY_NAME.fullmatch(name)
        return cls(int(found["iteration"]), found["phase"], int(found["step"])) if found else None

    def __str__(self) -> str:
        return "base" if self.phase == "base" else f"i{self.iteration}_{self.phase}_{self.step:06d}"


@dataclass(frozen=True, slots=True)
class Problem:
    """One verifiable problem of a data set."""

    id: str
    problem: str
    answer: str
    source: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A problem as the policy sees it: rendered by a template, then tokenised."""

    problem: Problem
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How responses are drawn from the policy."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()  # strings at which a response ends, beside the end token


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine answered: the sampled ids (end token included) and their logprobs [response]."""

    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str  # "stop" (end token or stop string), "length", or "abort": not finished
    weight_versions: tuple[tuple[int, int], ...]  # (weight version, how many tokens it sampled), in order
    engine: int = field(default=-1, compare=False)  # number of the one that finished it; -1: not known
    started: float = field(default=0.0, compare=False)  # Unix time at which an engine was asked
    seconds: float = field(default=0.0, compare=False)  # until its call was answered


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One response wanted from an engine. `seed` alone fixes the draw in deterministic mode."""

    prompt_ids: tuple[int, ...]
    seed: int
    partial: Completion | None = None  # go on from here: an aborted answer to the same request
    group: int = 0  # neighbours of one prompt and one number are a group

    @property
    def drawn(self) -> tuple[int, ...]:
        """The response ids there are already."""
        return self.partial.response_ids if self.partial is not None else ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """A verifier's answer about one response.

    reason: correct, wrong, no_answer, unparsable, timeout, crashed or truncated. vote: see `Rewards.votes`.
    """

    correct: bool
    reason: str
    seconds: float = 0.0
    vote: str = ""


@dataclass(frozen=True, slots=True)
class Times:
    """When a trajectory was made: Unix time at which an engine was asked for it, seconds of sampling and of grading."""

    started: float = 0.0
    generate_s: float = 0.0
    grade_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Trajectory:
    """Prompt, response, logprobs and reward of one sample.

    `key` identifies it. `correct` is the verdict, R(tau) > 0 in the paper; `reward` is what the update sees (shaped,
    perhaps with the overlong penalty). `logprobs` [response] are those of the engine that sampled it: the behaviour
    policy. `weight_versions` are (weight version, how many tokens it sampled), in order; more than one where a sync
    fell into the generation.
    """

    iteration: int
    step: int
    problem_id: str
    sample: int
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    weight_versions: tuple[tuple[int, int], ...]
    correct: bool
    reward: float
    reason: str
    group: int = 0  # of the problem's groups in the step
    engine: int = -1  # number of the engine that finished it; -1: not known
    times: Times = field(default=Times(), compare=False)

    @property
    def key(self) -> Key:
        return self.iteration, self.step, self.problem_id, self.sample


@dataclass(frozen=True, slots=True)
class ExpertQuery:
    """Which trajectories RFT takes: in the paper all of one phase, that is without `deduplicate` and what follows it.

    A problem is hard where its success rate over a phase is below `hard_threshold` (None: all are); it gives the
    successes of that phase. What narrows them: `deduplicate` (the default) drops exact copies of a response to the same
    problem but the first; `steps` are the (first, last) RL step to draw from, or empty; `min_tokens` of a response; at
    most `max_per_problem` (0: all) and a `share` of what is left, both drawn by `seed`.
    """

    iterations: tuple[int, ...]
    hard_threshold: float | None
    deduplicate: bool = True
    steps: tuple[int, ...] = ()
    min_tokens: int = 0
    max_per_problem: int = 0
    share: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """The G trajectories of one problem in one step."""

    problem_id: str
    trajectories: tuple[Trajectory, ...]


@dataclass(frozen=True, slots=True)
class Visit:
    """How a problem's samples of one RL step went."""

    iteration: int
    step: int
    samples: int
    successes: int


@dataclass(frozen=True, slots=True)
class Experience:
    """A trajectory as the policy update takes it.

    `old_logprobs` [response] are the denominators of the importance ratio: the engine's, or the trainer's own at the
    start of the step. `reference_logprobs` [response] are those of theta_i, for the KL term.
    """

    trajectory: Trajectory
    advantage: float
    old_logprobs: tuple[float, ...]
    reference_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """One supervised example: the loss is on the response tokens only. `reward`: R(tau) in eq. 6 of the paper."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    reward: float = 1.0


@dataclass(frozen=True, slots=True)
class Policy:
    """A policy on disk: a Hugging Face folder and the sha256 over its HF-named tensors, sorted by name."""

    path: Path
    digest: str
