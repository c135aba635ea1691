"""Queries over the shards: success rates of problems, and the expert trajectories of a phase."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rloop_mcore.algorithm.experts import drawn
from rloop_mcore.algorithm.hard_problems import is_hard
from rloop_mcore.trajectory.manifest import Shard
from rloop_mcore.trajectory.reader import ShardFile
from rloop_mcore.trajectory.schema import KEY, SCHEMA, with_large_lists
from rloop_mcore.types import ExpertQuery

PIECE = 16_384  # rows of a selection that are given out at once
READ_ONCE = 131_072  # successes: 2 GiB of 800 tokens each
_OUTCOME = ["iteration", "problem_id", "correct"]


class _Outcomes:
    """The small columns of at least one shard. Problems are numbers.

    Threads only read: NumPy is faster over all rows at once than where threads hand the interpreter to each other.
    """

    def __init__(self, directory: Path, shards: Sequence[Shard], columns: Sequence[str]) -> None:
        def read(shard: Shard) -> tuple[ShardFile, pa.Table]:
            file = ShardFile(directory, shard)
            return file, file.read(columns, dictionary=["problem_id"])

        with ThreadPoolExecutor(_threads()) as threads:
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
            mine = iterations == iteration
            if query.hard_threshold is not None:
                successes, samples = self.counts(iteration)
                mine &= np.take(is_hard(successes, np.maximum(samples, 1), query.hard_threshold), self._problem)
            wanted |= mine
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
    successes, samples = _Outcomes(directory, holding, _OUTCOME).counts(iteration)
    return successes[samples > 0], samples[samples > 0]


def select_experts(directory: Path, shards: Sequence[Shard], query: ExpertQuery) -> Iterator[pa.Table]:
    """The trajectories that RFT takes, all columns, in KEY order, in tables of PIECE rows; the last may have fewer.

    Small columns are read first, tokens only where a row group has a selected row: few do, as a shard has the rare
    successes first (`writer.stored_order`). Up to READ_ONCE successes are all in memory, some 20 bytes a token. Of more
    the responses are read to tell copies, and then the rows of a piece when it is due.
    """
    files, masks = _successes(directory, shards, query)
    if sum(mask.sum() for mask in masks) > READ_ONCE:
        order = _left(_identified(files, masks, query), query)
        for first in range(0, len(order), PIECE):
            yield _rows(files, masks, order[first : first + PIECE])
    elif files:
        with ThreadPoolExecutor(_threads()) as threads:
            whole = _joined(list(threads.map(ShardFile.take, files, masks)))
        order = _left(whole.select(KEY).append_column("response", _responses(whole)), query)
        for first in range(0, len(order), PIECE):
            yield whole.take(order[first : first + PIECE]).cast(SCHEMA)


def count_experts(directory: Path, shards: Sequence[Shard], query: ExpertQuery) -> int:
    """How many trajectories `select_experts` gives, without their tokens: a shard's at a time, and to tell copies."""
    files, masks = _successes(directory, shards, query)
    return len(_left(_identified(files, masks, query), query)) if files else 0


def _successes(
    directory: Path, shards: Sequence[Shard], query: ExpertQuery
) -> tuple[list[ShardFile], list[np.ndarray]]:
    """The shards that have the iterations, and which rows of each [rows] are what `_Outcomes.experts` says."""
    holding = [shard for shard in shards if any(shard.holds(iteration) for iteration in query.iterations)]
    if not holding:
        return [], []
    columns = [*_OUTCOME, *(["step"] if query.steps else []), *(["response_tokens"] if query.min_tokens else [])]
    outcomes = _Outcomes(directory, holding, columns)
    return outcomes.files, np.split(outcomes.experts(query), np.cumsum([shard.rows for shard in holding])[:-1])


def _identified(files: Sequence[ShardFile], masks: Sequence[np.ndarray], query: ExpertQuery) -> pa.Table:
    """What `_left` asks of the rows, shard by shard."""

    def of(file: ShardFile, mask: np.ndarray) -> pa.Table:
        if not query.deduplicate:
            return file.take(mask, KEY)
        table = _joined([file.take(mask, [*KEY, "response_ids"])])
        hashes = pa.array([sha256(each.as_buffer()).digest() for each in _responses(table)], pa.binary())
        return table.select(KEY).append_column("response", hashes)

    with ThreadPoolExecutor(_threads()) as threads:
        return pa.concat_tables(list(threads.map(of, files, masks))).combine_chunks()


def _rows(files: Sequence[ShardFile], masks: Sequence[np.ndarray], numbers: np.ndarray) -> pa.Table:
    """All columns of some rows, in the order of `numbers`, which count what `masks` choose in all files."""
    ascending, tables, first = np.sort(numbers), [], 0
    for file, mask in zip(files, masks, strict=True):
        places = np.flatnonzero(mask)
        begin, end = np.searchsorted(ascending, [first, first + len(places)])
        if begin < end:
            wanted = np.zeros(len(mask), bool)
            wanted[places[ascending[begin:end] - first]] = True
            tables.append(file.take(wanted))
        first += len(places)
    return _joined(tables).take(np.searchsorted(ascending, numbers)).cast(SCHEMA)


def _joined(tables: Sequence[pa.Table]) -> pa.Table:
    """One table of one chunk: Arrow would join the chunks for each `take`."""
    return with_large_lists(pa.concat_tables(tables)).combine_chunks()


def _left(found: pa.Table, query: ExpertQuery) -> np.ndarray:
    """The rows of `found` that the query leaves, in KEY order; `response` is the same for equal responses."""
    order = pc.sort_indices(found.select(KEY), sort_keys=[(name, "ascending") for name in KEY]).to_numpy()
    if query.deduplicate:
        order = _first_copies(found["problem_id"].combine_chunks(), found["response"].combine_chunks(), order)
    if query.max_per_problem or query.share < 1:
        keys = list(zip(*(found[name].take(order).to_pylist() for name in KEY), strict=True))
        order = order[drawn(keys, query)]
    return order


def _threads() -> int:
    return min(16, len(os.sched_getaffinity(0)))  # each has a shard open


def _responses(table: pa.Table) -> pa.Array:
    """The bytes of each response of a `_joined` table: lists have no dictionary, these have."""
    lists = table["response_ids"].combine_chunks()
    offsets = lists.offsets.to_numpy().astype(np.int64) * 4
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(lists.values.to_numpy())]
    return pa.Array.from_buffers(pa.large_binary(), len(lists), buffers)


def _first_copies(problems: pa.Array, responses: pa.Array, order: np.ndarray) -> np.ndarray:
    """Of the rows in `order`, the first of each (problem, response)."""
    problem, response = _codes(problems), _codes(responses)
    _, first = np.unique((problem << 32 | response)[order], return_index=True)
    return order[np.sort(first)]


def _codes(values: pa.Array) -> np.ndarray:
    """A number for each value, the same for equal ones."""
    return values.dictionary_encode().indices.to_numpy().astype(np.int64)
