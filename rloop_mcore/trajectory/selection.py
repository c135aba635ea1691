"""Queries over the shards: success rates of problems, and the expert trajectories of a phase."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rloop_mcore.algorithm.experts import drawn
from rloop_mcore.trajectory.manifest import Shard
from rloop_mcore.trajectory.reader import ShardFile
from rloop_mcore.trajectory.schema import KEY, SCHEMA, with_large_lists
from rloop_mcore.types import ExpertQuery

PIECE = 16_384  # rows of a selection that are taken at once
_OUTCOME = ["iteration", "problem_id", "correct"]


class _Outcomes:
    """The small columns of at least one shard. Problems are numbers.

    Threads only read: NumPy is faster over all rows at once than where threads hand the interpreter to each other.
    """

    def __init__(self, threads: Executor, directory: Path, shards: Sequence[Shard], columns: Sequence[str]) -> None:
        def read(shard: Shard) -> tuple[ShardFile, pa.Table]:
            file = ShardFile(directory, shard)
            return file, file.read(columns, dictionary=["problem_id"])

        found = list(threads.map(read, shards))
        self.files = [file for file, _ in found]
        self._table = pa.concat_tables([table for _, table in found]).unify_dictionaries().combine_chunks()
        self._problem = self._table["problem_id"].chunk(0).indices.to_numpy()
        self._problems = len(self._table["problem_id"].chunk(0).dictionary)
        self._correct = self._numbers("correct")

    def counts(self, iteration: int) -> tuple[np.ndarray, np.ndarray]:
        """Successes and samples of the iteration, of each problem [problems]."""
        mine = self._numbers("iteration") == iteration
        # a problem's failures and successes are neighbours
        outcomes = np.bincount((2 * self._problem + self._correct)[mine], minlength=2 * self._problems)
        return outcomes[1::2], outcomes[::2] + outcomes[1::2]

    def experts(self, query: ExpertQuery) -> np.ndarray:
        """Which rows are successes of hard problems that neither their step nor their length rules out [rows]."""
        iterations, wanted = self._numbers("iteration"), np.zeros(len(self._table), bool)
        for iteration in query.iterations:
            hard = _is_hard(*self.counts(iteration), query.hard_threshold)
            wanted |= (iterations == iteration) & hard[self._problem]
        wanted &= self._correct
        if query.steps:
            step, (first, last) = self._numbers("step"), query.steps
            wanted &= (first <= step) & (step <= last)
        if query.min_tokens:
            wanted &= self._numbers("response_tokens") >= query.min_tokens
        return wanted

    def _numbers(self, column: str) -> np.ndarray:
        return self._table[column].to_numpy()


def success_counts(directory: Path, shards: Sequence[Shard], iteration: int) -> tuple[np.ndarray, np.ndarray]:
    """Successes and samples [problems]: over all samples of the iteration, whatever the step; of problems with any."""
    holding = [shard for shard in shards if shard.holds(iteration)]
    if not holding:
        return np.zeros(0, int), np.zeros(0, int)
    with ThreadPoolExecutor(_threads()) as threads:
        successes, samples = _Outcomes(threads, directory, holding, _OUTCOME).counts(iteration)
    return successes[samples > 0], samples[samples > 0]


def select_experts(directory: Path, shards: Sequence[Shard], query: ExpertQuery) -> pa.Table:
    """The trajectories that RFT takes, all columns, in KEY order.

    Small columns are read first, tokens only where a row group has a selected row: few do, as a shard has the rare
    successes first (`writer.stored_order`). They are all in memory: some 20 bytes a token.
    """
    found = _found(directory, shards, query, ShardFile.take)
    if found is None:
        return SCHEMA.empty_table()
    experts = with_large_lists(found).combine_chunks()  # Arrow would join the chunks for each `take`
    del found
    order = _taken(experts, _as_bytes(experts["response_ids"].combine_chunks()), query)
    # Arrow's `take` has an index of each token: of a piece at a time
    pieces = [experts.take(order[first : first + PIECE]).cast(SCHEMA) for first in range(0, len(order), PIECE)]
    return pa.concat_tables([SCHEMA.empty_table(), *pieces])


def count_experts(directory: Path, shards: Sequence[Shard], query: ExpertQuery) -> int:
    """How many trajectories `select_experts` gives, without their tokens: a shard's at a time, and to tell copies."""
    columns = [*KEY, *(["response_ids"] if query.deduplicate else [])]

    def hashed(file: ShardFile, wanted: np.ndarray) -> pa.Table:
        table = file.take(wanted, columns)
        if not query.deduplicate:
            return table
        responses = _as_bytes(with_large_lists(table.select(["response_ids"]))["response_ids"].combine_chunks())
        hashes = pa.array([sha256(each.as_buffer()).digest() for each in responses], pa.binary())
        return table.select(KEY).append_column("response", hashes)

    found = _found(directory, shards, query, hashed)
    if found is None:
        return 0
    found = found.combine_chunks()
    return len(_taken(found, found["response"].combine_chunks() if query.deduplicate else None, query))


def _found(
    directory: Path,
    shards: Sequence[Shard],
    query: ExpertQuery,
    take: Callable[[ShardFile, np.ndarray], pa.Table],
) -> pa.Table | None:
    """What `take` makes of the successes of hard problems, shard by shard; None where no shard has the iterations."""
    holding = [shard for shard in shards if any(shard.holds(iteration) for iteration in query.iterations)]
    if not holding:
        return None
    columns = [*_OUTCOME, *(["step"] if query.steps else []), *(["response_tokens"] if query.min_tokens else [])]
    with ThreadPoolExecutor(_threads()) as threads:
        outcomes = _Outcomes(threads, directory, holding, columns)
        masks = np.split(outcomes.experts(query), np.cumsum([shard.rows for shard in holding])[:-1])
        return pa.concat_tables(list(threads.map(take, outcomes.files, masks)))


def _taken(found: pa.Table, responses: pa.Array | None, query: ExpertQuery) -> np.ndarray:
    """The rows of `found` that are left, in KEY order; `responses`: a value for each, the same for equal responses."""
    order = pc.sort_indices(found.select(KEY), sort_keys=[(name, "ascending") for name in KEY]).to_numpy()
    if query.deduplicate:
        order = _first_copies(found["problem_id"].combine_chunks(), responses, order)
    if query.max_per_problem or query.share < 1:
        keys = list(zip(*(found[name].take(order).to_pylist() for name in KEY), strict=True))
        order = order[drawn(keys, query)]
    return order


def _threads() -> int:
    return min(16, len(os.sched_getaffinity(0)))  # each has a shard open


def _is_hard(successes: np.ndarray, samples: np.ndarray, threshold: float | None) -> np.ndarray:
    """[problems]: the same quotient and comparison as algorithm.hard_problems.is_hard. Not of those without samples."""
    if threshold is None:
        return samples > 0
    return np.divide(successes, samples, out=np.full(len(samples), np.inf), where=samples > 0) < threshold


def _as_bytes(lists: pa.LargeListArray) -> pa.Array:
    """Each list's bytes: lists have no dictionary, these have."""
    offsets = lists.offsets.to_numpy().astype(np.int64) * 4
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(lists.values.to_numpy())]
    return pa.Array.from_buffers(pa.large_binary(), len(lists), buffers)


def _first_copies(problems: pa.Array, responses: pa.Array, order: np.ndarray) -> np.ndarray:
    """Of the rows in `order`, the first of each (problem, response)."""
    if not len(order):
        return order
    problem, response = _codes(problems), _codes(responses)
    _, first = np.unique((problem << 32 | response)[order], return_index=True)
    return order[np.sort(first)]


def _codes(values: pa.Array) -> np.ndarray:
    """A number for each value, the same for equal ones."""
    return values.dictionary_encode().indices.to_numpy().astype(np.int64)
