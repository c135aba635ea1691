"""Evaluate the policy the engines hold: sample, grade, score, write one JSON and one Parquet file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rloop_mcore.config import Config, EvaluationConfig
from rloop_mcore.evaluation.sampling import Graded, Sampler
from rloop_mcore.evaluation.scores import breakdown, intervals, scores_of, summary
from rloop_mcore.platform.files import atomic_path, write_atomic
from rloop_mcore.protocols import Rewards, Rollout
from rloop_mcore.types import Prompt, Sampling

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


@dataclass
class EngineEvaluator:
    """protocols.Evaluator over a fixed list of problems.

    Every evaluation uses the same seeds, so that two checkpoints differ by their policies and not by their luck.
    `at_once` requests are sampled and graded in one go; then `progress` is called with (name, responses done,
    responses in all). `conditions` are recorded as they are: see `conditions_of`.
    """

    rollout: Rollout
    rewards: Rewards
    prompts: Sequence[Prompt]
    decode: Callable[[Sequence[int]], str]
    config: EvaluationConfig
    sampling: Sampling
    seed: int
    directory: Path
    at_once: int
    progress: Callable[[str, int, int], None]
    conditions: Mapping[str, Any]
    # Name, samples and seconds of an evaluation that is not written yet: a full disk is no reason to sample again.
    _sampled: tuple[str, list[Graded], float] | None = field(default=None, init=False)

    def evaluate(self, name: str, policy: str) -> dict[str, float]:
        """Write `{name}.parquet` (the samples), then `{name}.json` (the numbers); returns the metrics' means, then
        those of each source, where the problems are of several, as METRIC/SOURCE.

        `policy` is recorded: the folder of the evaluated weights, relative to the run directory.
        """
        if self._sampled is None or self._sampled[0] != name:
            started = time.monotonic()
            self._sampled = name, self._sample(name), time.monotonic() - started
        _, rows, seconds = self._sampled
        with atomic_path(self.directory / f"{name}.parquet") as path, open(path, "wb") as file:
            pq.write_table(_samples_table(rows, self.decode), file, compression="zstd", write_page_checksum=True)
        scores = scores_of(rows, self.config.samples, self.config.k)
        metrics = intervals(scores, self.seed)
        groups = breakdown([prompt.problem for prompt in self.prompts], rows, scores, self.seed)
        record = {
            "name": name,
            "policy": policy,
            "metrics": metrics,
            "problems": len(self.prompts),
            "sampling": {**asdict(self.sampling), "samples": self.config.samples, "seed": self.seed},
            **self.conditions,
            **summary(rows),
            "groups": groups,
            "seconds": round(seconds, 3),
        }
        write_atomic(self.directory / f"{name}.json", json.dumps(record, indent=1) + "\n")
        self._sampled = None
        named = metrics | {
            f"{key}/{source}": interval
            for source, group in groups.get("source", {}).items()
            for key, interval in group["metrics"].items()
        }
        return {key: interval["mean"] for key, interval in named.items()}

    def _sample(self, name: str) -> list[Graded]:
        sampler = Sampler(self.rollout, self.rewards, self.decode, self.sampling, self.seed, self.at_once)
        wanted = [(prompt, sample) for prompt in self.prompts for sample in range(self.config.samples)]
        rows: list[Graded] = []
        self.progress(name, 0, len(wanted))
        for batch in sampler.batches(wanted):
            rows += map(Graded.of, batch)
            self.progress(name, len(rows), len(wanted))
        return rows


def conditions_of(config: Config) -> dict[str, str]:
    """How the problems are put and answers found: where these differ, results are not to be compared."""
    return {
        "template": config.data.template,
        "answer_format": config.reward.answer_format,
        "verifier": config.reward.verifier,
    }


def _samples_table(rows: Sequence[Graded], decode: Callable[[Sequence[int]], str]) -> pa.Table:
    columns = {name: [getattr(row, name) for row in rows] for name in _SAMPLE_SCHEMA.names if name != "text"}
    return pa.table(columns | {"text": [decode(row.response_ids) for row in rows]}, schema=_SAMPLE_SCHEMA)
