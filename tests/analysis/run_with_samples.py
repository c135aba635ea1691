"""A run directory with a real trajectory cache, expert sets and evaluations with responses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rloop_mcore.trajectory.cache import TrajectoryCache
from rloop_mcore.types import ExpertQuery, Trajectory

WORDS = ("so ", "$x^2$ ", "is ", "\\boxed{7} ", "<b>bold</b> ", "then ", "we ", "have ")
PROBLEMS, STEPS, SAMPLES, THRESHOLD = 9, 4, 8, 0.2


def decode(ids) -> str:  # type: ignore[no-untyped-def]
    return "".join(WORDS[id % len(WORDS)] for id in ids)


def add_samples(path: Path, iterations: int, evaluations: list[str], seed: int) -> list[Trajectory]:
    """Trajectories of every step, successes of varying rarity; and responses to 6 validation problems."""
    generator = np.random.default_rng(seed)
    ease = np.linspace(0, 0.8, PROBLEMS) ** 2
    cache, rows = TrajectoryCache(path / "cache"), []
    for iteration in range(iterations):
        for step in range(STEPS * 2 // iterations):
            drawn = [
                trajectory(generator, iteration, step, problem, sample, bool(generator.random() < ease[problem]))
                for problem in range(PROBLEMS)
                for sample in range(SAMPLES)
            ]
            cache.append(drawn)
            cache.seal()
            rows += drawn
        cache.write_experts(ExpertQuery((iteration,), THRESHOLD), path / "experts" / f"i{iteration}")
    for name in evaluations:
        write_evaluation(path / "evaluation" / f"{name}.parquet", generator)
    (path / "config.yaml").write_text(f"algorithm: {{hard_threshold: {THRESHOLD}, iterations: {iterations}}}\n")
    return rows


def trajectory(
    generator: np.random.Generator, iteration: int, step: int, problem: int, sample: int, correct: bool
) -> Trajectory:
    length = int(generator.integers(2, 12))
    return Trajectory(
        iteration=iteration,
        step=step,
        problem_id=f"train/{problem}",
        sample=sample,
        prompt_ids=(problem % 3, 1),
        response_ids=tuple(generator.integers(0, 8, length).tolist()),
        logprobs=(-0.5,) * length,
        finish_reason="stop" if length < 11 else "length",
        weight_versions=((1, length),),
        correct=correct,
        reward=float(correct),
        reason="correct" if correct else "wrong",
    )


def write_evaluation(path: Path, generator: np.random.Generator) -> None:
    rows = []
    for problem in range(6):
        for sample in range(4):
            ids = generator.integers(0, 8, generator.integers(2, 12)).tolist()
            right = bool(generator.random() < 0.3)
            verdict = (right, "correct" if right else "wrong", "stop")
            rows.append((f"validation/{problem}", sample, ids, decode(ids), *verdict))
    names = ["problem_id", "sample", "response_ids", "text", "correct", "reason", "finish_reason"]
    table = pa.table([list(column) for column in zip(*rows, strict=True)], names=names)
    pq.write_table(table.set_column(2, "response_ids", table["response_ids"].cast(pa.list_(pa.int32()))), path)
