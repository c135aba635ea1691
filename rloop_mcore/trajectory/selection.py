"""Queries over the shards: success rates of problems, and the expert trajectories of a phase."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rloop_mcore.algorithm.experts import drawn
from rloop_mcore.trajectory.manifest import Shard
from rloop_mcore.trajectory.reader import ShardFile
from rloop_mcore.trajectory.schema import KEY, SCHEMA
from rloop_mcore.types import ExpertQuery

_OUTCOME = ["iteration", "problem_id", "correct"]


class _Outcomes:
    """The small columns of one shard. Its problems are numbers into `problems`."""

    def __init__(self, directory: Path, shard: Shard, columns: Sequence[str]) -> None:
        self.file = ShardFile(directory, shard)
        self._table = self.file.read_coded(columns, "problem_id")
        self.problems: pa.StringArray = self._table["problem_id"].dictionary
        self._problem = self._table["problem_id"].indices.to_numpy()
        self._correct = self._numbers("correct")

    def counts(self, iteration: int) -> np.ndarray:
        """Successes and samples of the iteration [2, problems]."""
        mine = self._numbers("iteration") == iteration
        return np.stack(
            [np.bincount(self._problem[rows], minlength=len(self.problems)) for rows in (mine & self._correct, mine)]
        )

    def experts(self, is_hard: Mapping[int, np.ndarray], query: ExpertQuery) -> pa.Table:
        """The successes of hard problems that neither their step nor their length rules out.

        is_hard: by iteration, [problems].
        """
        iterations, wanted = self._numbers("iteration"), np.zeros(len(self._table), bool)
        for iteration, hard in is_hard.items():
            wanted |= (iterations == iteration) & hard[self._problem]
        wanted &= self._correct
        if query.steps:
            step, (first, last) = self._numbers("step"), query.steps
            wanted &= (first <= step) & (step <= last)
        if query.min_tokens:
            wanted &= self._numbers("response_tokens") >= query.min_tokens
        return self.file.take(pa.array(wanted))

    def _numbers(self, column: str) -> np.ndarray:
        return self._table[column].to_numpy(zero_copy_only=False)


def success_counts(directory: Path, shards: Sequence[Shard], iteration: int) -> pa.Table:
    """Columns problem_id, successes, samples: over all samples of the iteration, whatever the step. Sorted."""
    with ThreadPoolExecutor(_threads()) as threads:
        holding = [shard for shard in shards if shard.holds(iteration)]
        outcomes = list(threads.map(lambda shard: _Outcomes(directory, shard, _OUTCOME), holding))
    counts = [outcome.counts(iteration) for outcome in outcomes]
    return _total(_problems(outcomes), counts).sort_by("problem_id")


def select_experts(directory: Path, shards: Sequence[Shard], query: ExpertQuery) -> pa.Table:
    """The trajectories that RFT takes, all columns, in KEY order.

    Small columns are read first, tokens only where a row group has a selected row: few do, as a shard has the rare
    successes first (`writer.stored_order`). A thread a shard.
    """
    columns = [*_OUTCOME, *(["step"] if query.steps else []), *(["response_tokens"] if query.min_tokens else [])]

    def look(shard: Shard) -> tuple[_Outcomes, list[np.ndarray]]:
        outcomes = _Outcomes(directory, shard, columns)
        return outcomes, [outcomes.counts(iteration) for iteration in query.iterations]

    with ThreadPoolExecutor(_threads()) as threads:
        holding = [shard for shard in shards if any(shard.holds(iteration) for iteration in query.iterations)]
        looks = list(threads.map(look, holding))
        outcomes = [found for found, _ in looks]
        names = _problems(outcomes)
        bounds = [0, *np.cumsum([len(found.problems) for found in outcomes])]
        is_hard: list[dict[int, np.ndarray]] = [{} for _ in outcomes]
        for number, iteration in enumerate(query.iterations):
            total = _total(names, [counts[number] for _, counts in looks])
            hard = pc.is_in(names, value_set=_hard_problems(total, query)).to_numpy()
            for of_shard, (low, high) in zip(is_hard, pairwise(bounds), strict=True):
                of_shard[iteration] = hard[low:high]
        pieces = threads.map(lambda found, hard: found.experts(hard, query), outcomes, is_hard)
        experts = pa.concat_tables([SCHEMA.empty_table(), *pieces])
    experts = experts.sort_by([(name, "ascending") for name in KEY])
    if query.deduplicate:
        experts = experts.take(_first_copies(experts))
    if query.max_per_problem or query.share < 1:
        keys = list(zip(*(experts[name].to_pylist() for name in KEY), strict=True))
        experts = experts.take(pa.array(drawn(keys, query), pa.int64()))
    return experts


def _threads() -> int:
    return min(16, len(os.sched_getaffinity(0)))  # each has a shard open


def _problems(outcomes: Sequence[_Outcomes]) -> pa.ChunkedArray:
    """The problems of every shard, one shard after the other."""
    return pa.chunked_array([found.problems for found in outcomes], pa.string())


def _total(problems: pa.ChunkedArray, counts: Sequence[np.ndarray]) -> pa.Table:
    """Columns problem_id, successes, samples: the sums over the shards, of problems with samples."""
    successes, samples = np.concatenate([np.empty((2, 0), np.int64), *counts], axis=1)
    table = pa.table({"problem_id": problems, "successes": successes, "samples": samples})
    total = table.group_by("problem_id").aggregate([("successes", "sum"), ("samples", "sum")])
    return total.rename_columns(table.column_names).filter(pc.field("samples") > 0)


def _hard_problems(counts: pa.Table, query: ExpertQuery) -> pa.ChunkedArray:
    if query.hard_threshold is None:
        return counts["problem_id"]
    # The same quotient and comparison as algorithm.hard_problems.is_hard, on columns.
    rate = pc.divide(counts["successes"].cast(pa.float64()), counts["samples"].cast(pa.float64()))
    return counts["problem_id"].filter(pc.less(rate, query.hard_threshold))


def _first_copies(table: pa.Table) -> pa.ChunkedArray:
    """Ascending rows of the first of each (problem, response)."""
    responses = table["response_ids"].combine_chunks()
    if isinstance(responses, pa.ChunkedArray):  # of an empty table
        return pa.chunked_array([], pa.int64())
    # Lists are no keys of group_by; their bytes are.
    offsets = responses.offsets.to_numpy().astype(np.int64) * 4
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(responses.values.to_numpy())]
    as_bytes = pa.Array.from_buffers(pa.large_binary(), len(responses), buffers)
    rows = pa.table([table["problem_id"], as_bytes, np.arange(len(table))], ["problem_id", "response", "row"])
    return rows.group_by(["problem_id", "response"]).aggregate([("row", "min")]).sort_by("row_min")["row_min"]
