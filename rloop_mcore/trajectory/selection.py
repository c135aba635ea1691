"""Queries over the shards: success rates of problems, and the expert trajectories of a phase."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from rloop_mcore.trajectory.manifest import Shard
from rloop_mcore.trajectory.reader import ShardFile
from rloop_mcore.trajectory.schema import KEY, SCHEMA, from_table
from rloop_mcore.types import Trajectory

_OUTCOME = ["iteration", "problem_id", "correct"]


def success_counts(directory: Path, shards: Sequence[Shard], iteration: int) -> pa.Table:
    """Columns problem_id, successes, samples: over all samples of the iteration, whatever the step. Sorted."""
    return _counts([file.read(_OUTCOME) for file in _files(directory, shards, iteration)], iteration)


def select_experts(
    directory: Path, shards: Sequence[Shard], iteration: int, hard_threshold: float, deduplicate: bool
) -> list[Trajectory]:
    """D_expert(iteration) in KEY order: the correct trajectories of the problems whose rate is below the threshold.

    Small columns are read first, tokens only where a row group has a selected row. `deduplicate` drops exact copies
    of a response to the same problem but the first.
    """
    files = _files(directory, shards, iteration)
    outcomes = [file.read(_OUTCOME) for file in files]
    counts = _counts(outcomes, iteration)
    # The same quotient and comparison as algorithm.hard_problems.is_hard, on columns.
    rate = pc.divide(counts["successes"].cast(pa.float64()), counts["samples"].cast(pa.float64()))
    hard = counts["problem_id"].filter(pc.less(rate, hard_threshold))

    pieces = [SCHEMA.empty_table()]
    for file, outcome in zip(files, outcomes, strict=True):
        wanted = pc.and_(outcome["correct"], pc.equal(outcome["iteration"], iteration))
        wanted = pc.and_(wanted, pc.is_in(outcome["problem_id"], value_set=hard))
        pieces.append(file.take(wanted.combine_chunks()))
    selected = pa.concat_tables(pieces)
    experts = from_table(selected.sort_by([(name, "ascending") for name in KEY]))
    return _without_copies(experts) if deduplicate else experts


def _files(directory: Path, shards: Sequence[Shard], iteration: int) -> list[ShardFile]:
    return [ShardFile(directory, shard) for shard in shards if shard.holds(iteration)]


def _counts(outcomes: Sequence[pa.Table], iteration: int) -> pa.Table:
    mine = [table.filter(pc.field("iteration") == iteration).drop(["iteration"]) for table in outcomes]
    correct = pa.concat_tables([SCHEMA.empty_table().select(["problem_id", "correct"]), *mine])
    correct = correct.set_column(1, "correct", correct["correct"].cast(pa.int64()))
    grouped = correct.group_by("problem_id").aggregate([("correct", "sum"), ("correct", "count")])
    return grouped.rename_columns(["problem_id", "successes", "samples"]).sort_by("problem_id")


def _without_copies(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    first: dict[tuple[str, tuple[int, ...]], Trajectory] = {}
    for trajectory in trajectories:
        first.setdefault((trajectory.problem_id, trajectory.response_ids), trajectory)
    return list(first.values())
