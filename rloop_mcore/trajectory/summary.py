"""What a cache holds, phase by phase: counts from the small columns, one shard in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from rloop_mcore.trajectory.manifest import Shard
from rloop_mcore.trajectory.reader import ShardFile
from rloop_mcore.trajectory.schema import from_table
from rloop_mcore.types import Trajectory, Visit

_COLUMNS = ["iteration", "step", "correct", "finish_reason"]
_VISIT = ["iteration", "step", "problem_id"]


@dataclass
class Phase:
    """The exploration of one iteration. `truncated`: ended by the token limit."""

    iteration: int
    steps: set[int] = field(default_factory=set)
    trajectories: int = 0
    correct: int = 0
    truncated: int = 0


def phases(directory: Path, shards: Sequence[Shard]) -> list[Phase]:
    """The phases that have trajectories, in order. Raises UserError for a shard that cannot be read."""
    found: dict[int, Phase] = {}
    for shard in shards:
        table = ShardFile(directory, shard).read(_COLUMNS)
        counts = table.group_by(_COLUMNS).aggregate([([], "count_all")])
        for row in counts.to_pylist():
            phase, count = found.setdefault(row["iteration"], Phase(row["iteration"])), row["count_all"]
            phase.steps.add(row["step"])
            phase.trajectories += count
            phase.correct += count * row["correct"]
            phase.truncated += count * (row["finish_reason"] == "length")
    return [found[iteration] for iteration in sorted(found)]


def visits(directory: Path, shards: Sequence[Shard]) -> list[tuple[str, Visit]]:
    """How every problem (by id) went in every RL step, in the order of the steps; whichever shard a row is in."""

    def counted(shard: Shard) -> pa.Table:
        table = ShardFile(directory, shard).read([*_VISIT, "correct"])
        counts = table.group_by(_VISIT).aggregate([([], "count_all"), ("correct", "sum")])
        return counts.rename_columns([*_VISIT, "samples", "successes"])

    tables = [counted(shard) for shard in shards]
    if not tables:
        return []
    sums = pa.concat_tables(tables).group_by(_VISIT).aggregate([("samples", "sum"), ("successes", "sum")])
    ordered = sums.sort_by([(name, "ascending") for name in _VISIT])
    iteration, step, problem, samples, successes = (column.to_pylist() for column in ordered.columns)
    return list(zip(problem, map(Visit, iteration, step, samples, successes), strict=True))


def rows(
    directory: Path, shards: Sequence[Shard], iteration: int | None, problem_id: str | None
) -> Iterator[Trajectory]:
    """The trajectories of an iteration and of a problem, or of all; shard by shard, as they are stored.

    A row group in memory at a time, and none that has no such row.
    """

    def wanted(keys: pa.Table) -> pa.BooleanArray:
        chosen = pa.chunked_array([pa.array([True] * len(keys))])
        if iteration is not None:
            chosen = pc.and_(chosen, pc.equal(keys["iteration"], iteration))
        if problem_id is not None:
            chosen = pc.and_(chosen, pc.equal(keys["problem_id"], problem_id))
        return chosen.combine_chunks()

    for shard in shards:
        if iteration is None or shard.holds(iteration):
            for table in ShardFile(directory, shard).rows_where(["iteration", "problem_id"], wanted):
                yield from from_table(table)
