"""The evaluator over scripted engines: the files and numbers must be those of the scripted answers."""

import errno
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import comb
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rloop_mcore.config import EvaluationConfig
from rloop_mcore.evaluation import evaluate
from rloop_mcore.evaluation.evaluate import EngineEvaluator
from rloop_mcore.protocols import Answered
from rloop_mcore.types import Completion, Problem, Prompt, SampleRequest, Sampling, Verdict

SAMPLES = 8


class ScriptedEngine:
    """Problem p is answered rightly by its first p samples; the problem's number is its prompt."""

    def __init__(self) -> None:
        self.requests: list[SampleRequest] = []
        self.sampling: Sampling | None = None
        self._asked: dict[int, int] = {}

    def sync(self, weights: Iterator[Any], version: int) -> dict[str, float]:
        raise AssertionError("an evaluation does not move weights")

    def generate(
        self, requests: Sequence[SampleRequest], sampling: Sampling, answered: Answered | None = None
    ) -> list[Completion]:
        self.requests += requests
        self.sampling = sampling
        completions = [self._answer(request.prompt_ids[0]) for request in requests]
        assert answered is not None
        for row in reversed(range(len(completions))):  # the last one comes first
            answered([row], [completions[row]])
        return completions

    def _answer(self, problem: int) -> Completion:
        sample = self._asked.get(problem, 0)
        self._asked[problem] = sample + 1
        right = sample < problem
        return Completion((1, 2) if right else (0, 2, 2, 2), (0.0,) * 2, "stop" if right else "length", ((1, 2),))


class FirstTokenIsOne:
    def grade(self, items: Iterable[tuple[Problem, str, bool]]) -> list[Verdict]:
        texts = [(text, truncated) for _, text, truncated in items]
        assert all(truncated == text.startswith("0") for text, truncated in texts)
        return [Verdict(text.startswith("1"), "correct" if text.startswith("1") else "wrong") for text, _ in texts]


def prompts(count: int) -> list[Prompt]:
    return [Prompt(Problem(f"p{number}", "?", "!"), (number, 7)) for number in range(count)]


def evaluator(directory: Path, engine: ScriptedEngine | None = None, **changes: Any) -> EngineEvaluator:
    arguments: dict[str, Any] = {
        "rollout": engine or ScriptedEngine(),
        "rewards": FirstTokenIsOne(),
        "prompts": prompts(5),
        "decode": lambda ids: " ".join(map(str, ids)),
        "config": EvaluationConfig(samples=SAMPLES, k=[1, 2, SAMPLES]),
        "sampling": Sampling(4, 1.0, 0.7),
        "seed": 11,
        "directory": directory,
        "at_once": 4096,
        "progress": lambda name, done, total: None,
        "conditions": {},
    }
    return EngineEvaluator(**(arguments | changes))


def test_numbers_are_those_of_the_answers(tmp_path: Path) -> None:
    headline = evaluator(tmp_path).evaluate("i0_explore_000020", "policies/i0_explore_000020")
    record = json.loads((tmp_path / "i0_explore_000020.json").read_text())

    def mean_pass(k: int) -> float:
        return sum(1 - comb(SAMPLES - c, k) / comb(SAMPLES, k) for c in range(5)) / 5

    expected = {"avg@8": (0 + 1 + 2 + 3 + 4) / 40, "pass@1": 0.25, "pass@2": mean_pass(2), "pass@8": 4 / 5}
    assert headline == pytest.approx(expected)
    assert {key: value["mean"] for key, value in record["metrics"].items()} == pytest.approx(expected)
    assert all(value["low"] <= value["mean"] <= value["high"] for value in record["metrics"].values())
    assert record["policy"] == "policies/i0_explore_000020"
    assert record["counts"] == {f"p{c}": [c, SAMPLES] for c in range(5)}
    assert record["reasons"] == {"correct": 10, "wrong": 30}
    assert record["response_length"] == pytest.approx((10 * 2 + 30 * 4) / 40)
    assert record["truncated"] == pytest.approx(30 / 40)


def test_problems_of_several_sources_are_measured_by_source_too(tmp_path: Path) -> None:
    sources = ["aime24", "aime24", "math-ai/amc", "math-ai/amc", ""]
    named = [replace(p, problem=replace(p.problem, source=s)) for p, s in zip(prompts(5), sources, strict=True)]
    headline = evaluator(tmp_path, prompts=named).evaluate("base", "policies/base")
    everyone = evaluator(tmp_path).evaluate("all", "policies/base")
    assert list(headline)[: len(everyone)] == list(everyone)
    assert headline == pytest.approx(
        everyone
        | {"avg@8/aime24": 1 / 16, "pass@1/aime24": 1 / 16, "pass@2/aime24": 1 / 8, "pass@8/aime24": 1 / 2}
        | {"avg@8/math-ai/amc": 5 / 16, "pass@1/math-ai/amc": 5 / 16, "pass@8/math-ai/amc": 1.0}
        | {"pass@2/math-ai/amc": (1 - comb(6, 2) / comb(8, 2) + 1 - comb(5, 2) / comb(8, 2)) / 2}
    )
    record = json.loads((tmp_path / "base.json").read_text())
    assert list(record["metrics"]) == list(everyone)
    assert {source: group["problems"] for source, group in record["groups"]["source"].items()} == {
        "aime24": 2,
        "math-ai/amc": 2,
    }


def test_what_could_not_be_written_is_not_sampled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = ScriptedEngine()
    one = evaluator(tmp_path, engine)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "write_atomic", full)
        with pytest.raises(OSError, match="No space left"):
            one.evaluate("base", "policies/base")
    assert one.evaluate("base", "policies/base") == evaluator(tmp_path).evaluate("base", "policies/base")
    assert len(engine.requests) == 5 * SAMPLES
    one.evaluate("base", "policies/base")
    assert len(engine.requests) == 10 * SAMPLES


def test_samples_are_kept_for_the_analyses(tmp_path: Path) -> None:
    evaluator(tmp_path).evaluate("base", "policies/base")
    rows = pq.read_table(tmp_path / "base.parquet").to_pylist()
    assert [(row["problem_id"], row["sample"]) for row in rows] == [(f"p{p}", s) for p in range(5) for s in range(8)]
    first_right = next(row for row in rows if row["correct"])
    assert first_right == {
        "problem_id": "p1",
        "sample": 0,
        "response_ids": [1, 2],
        "text": "1 2",
        "correct": True,
        "reason": "correct",
        "finish_reason": "stop",
    }


def test_a_flipped_bit_of_the_samples_is_found(tmp_path: Path) -> None:
    evaluator(tmp_path).evaluate("base", "policies/base")
    path = tmp_path / "base.parquet"
    verdicts = pq.read_metadata(path).row_group(0).column(4)
    content = bytearray(path.read_bytes())
    content[verdicts.data_page_offset + verdicts.total_compressed_size - 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(path, page_checksum_verification=True)


def test_sampling_follows_the_config_and_every_checkpoint_gets_the_same_seeds(tmp_path: Path) -> None:
    first, second = ScriptedEngine(), ScriptedEngine()
    evaluator(tmp_path, first).evaluate("base", "policies/base")
    evaluator(tmp_path, second).evaluate("i0_explore_000001", "policies/other")
    assert first.sampling == Sampling(max_tokens=4, temperature=1.0, top_p=0.7)
    assert len({request.seed for request in first.requests}) == 5 * SAMPLES
    assert first.requests == second.requests


def test_batches_change_nothing_but_the_progress(tmp_path: Path) -> None:
    whole = evaluator(tmp_path / "whole").evaluate("base", "policies/base")
    seen: list[tuple[str, int, int]] = []
    small = evaluator(tmp_path / "pieces", at_once=16, progress=lambda *place: seen.append(place))
    pieces = small.evaluate("base", "policies/base")
    assert pieces == whole
    assert seen == [("base", done, 40) for done in (0, 16, 32, 40)]
