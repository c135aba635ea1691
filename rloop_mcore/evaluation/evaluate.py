"""Evaluate the policy the engines hold: sample, grade, score, write one JSON and one Parquet file."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rloop_mcore.algorithm.seeds import derive_seed
from rloop_mcore.config import EvaluationConfig
from rloop_mcore.errors import UserError
from rloop_mcore.evaluation.bootstrap import bootstrap_interval
from rloop_mcore.evaluation.pass_at_k import average, pass_at_k
from rloop_mcore.platform.files import atomic_path, write_atomic
from rloop_mcore.protocols import Rewards, Rollout
from rloop_mcore.types import Completion, Prompt, SampleRequest, Sampling, Verdict

_SAMPLE_SCHEMA = pa.schema(
    [
        ("problem_id", pa.string()),
        ("sample", pa.int32()),
        ("response_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("correct", pa.bool_()),
        ("reason", pa.string()),
        ("finish_reason", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class Answer:
    """One graded sample."""

    problem_id: str
    sample: int
    completion: Completion
    text: str
    verdict: Verdict


class EngineEvaluator:
    """protocols.Evaluator over a fixed list of problems.

    Every evaluation uses the same seeds, so that two checkpoints differ by their policies and not by their luck.
    `at_once` requests are sampled and graded in one go: enough to fill the engines, few enough to show progress.
    `progress`, if given, is called with (responses done, responses in all).
    Raises UserError for a config that cannot be evaluated.
    """

    def __init__(
        self,
        rollout: Rollout,
        rewards: Rewards,
        prompts: Sequence[Prompt],
        decode: Callable[[Sequence[int]], str],
        config: EvaluationConfig,
        max_tokens: int,
        stop: tuple[str, ...],
        seed: int,
        directory: Path,
        at_once: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._rollout = rollout
        self._rewards = rewards
        self._prompts = list(prompts[: config.limit])
        self._decode = decode
        self._config = config
        self._sampling = Sampling(max_tokens, config.temperature, config.top_p, stop)
        self._seed = seed
        self._directory = directory
        self._at_once = at_once
        self._progress = progress or (lambda done, total: None)
        # Name, answers and seconds of an evaluation that is not written yet: a full disk is no reason to sample again.
        self._sampled: tuple[str, list[Answer], float] | None = None
        _check(config, self._prompts)

    def evaluate(self, name: str, policy: str) -> dict[str, float]:
        """Write `{name}.parquet` (the samples), then `{name}.json` (the numbers); returns the metrics' means.

        `policy` is recorded: the folder of the evaluated weights, relative to the run directory.
        """
        if self._sampled is None or self._sampled[0] != name:
            started = time.monotonic()
            self._sampled = name, self._sample(), time.monotonic() - started
        _, answers, seconds = self._sampled
        with atomic_path(self._directory / f"{name}.parquet") as path:
            pq.write_table(_samples_table(answers), path, compression="zstd")
        metrics = _metrics(answers, self._config, self._seed)
        record = {
            "name": name,
            "policy": policy,
            "metrics": metrics,
            "problems": len(self._prompts),
            "sampling": {**asdict(self._sampling), "samples": self._config.samples, "seed": self._seed},
            **_summary(answers),
            "seconds": round(seconds, 3),
        }
        write_atomic(self._directory / f"{name}.json", json.dumps(record, indent=1) + "\n")
        self._sampled = None
        return {key: interval["mean"] for key, interval in metrics.items()}

    def _sample(self) -> list[Answer]:
        wanted = [(prompt, sample) for prompt in self._prompts for sample in range(self._config.samples)]
        answers: list[Answer] = []
        self._progress(0, len(wanted))
        for start in range(0, len(wanted), self._at_once):
            answers += self._answer(wanted[start : start + self._at_once])
            self._progress(len(answers), len(wanted))
        return answers

    def _answer(self, wanted: Sequence[tuple[Prompt, int]]) -> list[Answer]:
        requests = [
            SampleRequest(prompt.ids, derive_seed(self._seed, "evaluation", prompt.problem.id, sample))
            for prompt, sample in wanted
        ]
        completions = self._rollout.generate(requests, self._sampling)
        texts = [self._decode(completion.response_ids) for completion in completions]
        verdicts = self._rewards.grade(
            [
                (prompt.problem, text, completion.finish_reason == "length")
                for (prompt, _), text, completion in zip(wanted, texts, completions, strict=True)
            ]
        )
        return [
            Answer(prompt.problem.id, sample, completion, text, verdict)
            for (prompt, sample), completion, text, verdict in zip(wanted, completions, texts, verdicts, strict=True)
        ]


def _check(config: EvaluationConfig, prompts: Sequence[Prompt]) -> None:
    if not prompts:
        raise UserError("data.validation holds no problem to evaluate on: give a file with at least one")
    if config.samples < 1:
        raise UserError(f"evaluation.samples is {config.samples}; at least 1 response a problem is needed")
    impossible = [k for k in config.k if not 1 <= k <= config.samples]
    if impossible:
        raise UserError(
            f"evaluation.k holds {impossible[0]}, but pass@k needs 1 <= k <= evaluation.samples = {config.samples}"
        )
    repeated = [id for id, count in Counter(prompt.problem.id for prompt in prompts).items() if count > 1]
    if repeated:
        raise UserError(f"data.validation holds the problem id {repeated[0]!r} twice; ids must be unique")


def _metrics(answers: Sequence[Answer], config: EvaluationConfig, seed: int) -> dict[str, dict[str, float]]:
    counts = _counts(answers)
    successes, samples = zip(*counts.values(), strict=True)
    scores = {f"avg@{config.samples}": average(successes, samples)}
    scores |= {f"pass@{k}": pass_at_k(successes, samples, k) for k in sorted(set(config.k))}
    return {key: asdict(bootstrap_interval(values, seed)) for key, values in scores.items()}


def _counts(answers: Sequence[Answer]) -> dict[str, list[int]]:
    counts: dict[str, list[int]] = {}
    for answer in answers:
        count = counts.setdefault(answer.problem_id, [0, 0])
        count[0] += answer.verdict.correct
        count[1] += 1
    return counts


def _summary(answers: Sequence[Answer]) -> dict[str, Any]:
    completions = [answer.completion for answer in answers]
    return {
        "response_length": sum(len(completion.response_ids) for completion in completions) / len(completions),
        "truncated": sum(completion.finish_reason == "length" for completion in completions) / len(completions),
        "reasons": dict(sorted(Counter(answer.verdict.reason for answer in answers).items())),
        "counts": _counts(answers),
    }


def _samples_table(answers: Sequence[Answer]) -> pa.Table:
    rows = [
        (
            answer.problem_id,
            answer.sample,
            answer.completion.response_ids,
            answer.text,
            answer.verdict.correct,
            answer.verdict.reason,
            answer.completion.finish_reason,
        )
        for answer in answers
    ]
    columns = zip(*rows, strict=True)
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, _SAMPLE_SCHEMA, strict=True)],
        schema=_SAMPLE_SCHEMA,
    )
