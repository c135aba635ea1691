"""Queries over the shards: success rates of problems, and the expert trajectories of a phase."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
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
_CHOSEN_BY = [*_OUTCOME, "step", "response_tokens"]


def success_counts(directory: Path, shards: Sequence[Shard], iteration: int) -> pa.Table:
    """Columns problem_id, successes, samples: over all samples of the iteration, whatever the step. Sorted."""
    files = _files(directory, shards, [iteration])
    with _threads() as threads:
        counts = list(threads.map(lambda file: _counts(file.read(_OUTCOME), iteration), files))
    return _total(counts).sort_by("problem_id")


def select_experts(directory: Path, shards: Sequence[Shard], query: ExpertQuery) -> pa.Table:
    """The trajectories that RFT takes, all columns, in KEY order.

    Small columns are read first, tokens only where a row group has a selected row: few do, as a shard has the rare
    successes first (`writer.stored_order`). A thread a file.
    """
    files = _files(directory, shards, query.iterations)
    with _threads() as threads:
        outcomes = list(threads.map(lambda file: file.read(_CHOSEN_BY), files))
        hard = {}
        for iteration in query.iterations:
            counts = list(threads.map(lambda table, i=iteration: _counts(table, i), outcomes))
            hard[iteration] = _hard_problems(_total(counts), query)
        pieces = threads.map(lambda file, table: file.take(_wanted(table, hard, query)), files, outcomes)
        experts = pa.concat_tables([SCHEMA.empty_table(), *pieces])
    experts = experts.sort_by([(name, "ascending") for name in KEY])
    if query.deduplicate:
        experts = experts.take(_first_copies(experts))
    if query.max_per_problem or query.share < 1:
        keys = list(zip(*(experts[name].to_pylist() for name in KEY), strict=True))
        experts = experts.take(pa.array(drawn(keys, query), pa.int64()))
    return experts


def _files(directory: Path, shards: Sequence[Shard], iterations: Sequence[int]) -> list[ShardFile]:
    return [ShardFile(directory, shard) for shard in shards if any(shard.holds(i) for i in iterations)]


def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)))


def _counts(outcome: pa.Table, iteration: int) -> pa.Table:
    """Columns problem_id, successes, samples of one shard."""
    mine = outcome.filter(pc.field("iteration") == iteration)
    mine = pa.table({"problem_id": mine["problem_id"], "correct": mine["correct"].cast(pa.int64())})
    grouped = mine.group_by("problem_id", use_threads=False).aggregate([("correct", "sum"), ("correct", "count")])
    return grouped.rename_columns(["problem_id", "successes", "samples"])


def _total(counts: Sequence[pa.Table]) -> pa.Table:
    together = pa.concat_tables([_counts(SCHEMA.empty_table(), 0), *counts])
    total = together.group_by("problem_id").aggregate([("successes", "sum"), ("samples", "sum")])
    return total.rename_columns(["problem_id", "successes", "samples"])


def _hard_problems(counts: pa.Table, query: ExpertQuery) -> pa.ChunkedArray:
    if query.hard_threshold is None:
        return counts["problem_id"]
    # The same quotient and comparison as algorithm.hard_problems.is_hard, on columns.
    rate = pc.divide(counts["successes"].cast(pa.float64()), counts["samples"].cast(pa.float64()))
    return counts["problem_id"].filter(pc.less(rate, query.hard_threshold))


def _wanted(outcome: pa.Table, hard: dict[int, pa.ChunkedArray], query: ExpertQuery) -> pa.BooleanArray:
    """Which rows [rows] are successes of hard problems that neither their step nor their length rules out."""
    of_hard = [
        pc.and_(pc.equal(outcome["iteration"], iteration), pc.is_in(outcome["problem_id"], value_set=problems))
        for iteration, problems in hard.items()
    ]
    wanted = pc.and_(outcome["correct"], reduce(pc.or_, of_hard))
    if query.steps:
        first, last = query.steps
        wanted = pc.and_(wanted, pc.greater_equal(outcome["step"], first))
        wanted = pc.and_(wanted, pc.less_equal(outcome["step"], last))
    return pc.and_(wanted, pc.greater_equal(outcome["response_tokens"], query.min_tokens)).combine_chunks()


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
