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


def success_counts(directory: Path, shards: Sequence[Shard], iteration: int) -> pa.Table:
    """Columns problem_id, successes, samples: over all samples of the iteration, whatever the step. Sorted."""
    pieces = [SCHEMA.empty_table().select(["problem_id", "correct"])]
    for shard in shards:
        if shard.holds(iteration):
            table = ShardFile(directory, shard).read(["iteration", "problem_id", "correct"])
            pieces.append(table.filter(pc.field("iteration") == iteration).drop(["iteration"]))
    correct = pa.concat_tables(pieces)
    correct = correct.set_column(1, "correct", correct["correct"].cast(pa.int64()))
    grouped = correct.group_by("problem_id").aggregate([("correct", "sum"), ("correct", "count")])
    return grouped.rename_columns(["problem_id", "successes", "samples"]).sort_by("problem_id")


def select_experts(
    directory: Path, shards: Sequence[Shard], iteration: int, hard_threshold: float, deduplicate: bool
) -> list[Trajectory]:
    """D_expert(iteration) in KEY order: the correct trajectories of the problems whose rate is below the threshold.

    Small columns are read first, tokens only where a row group has a selected row. `deduplicate` drops exact copies
    of a response to the same problem but the first.
    """
    counts = success_counts(directory, shards, iteration)
    # The same quotient and comparison as algorithm.hard_problems.is_hard, on columns.
    rate = pc.divide(counts["successes"].cast(pa.float64()), counts["samples"].cast(pa.float64()))
    hard = counts["problem_id"].filter(pc.less(rate, hard_threshold))

    pieces = [SCHEMA.empty_table()]
    for shard in shards:
        if shard.holds(iteration):
            file = ShardFile(directory, shard)
            keys = file.read(["iteration", "problem_id", "correct"])
            wanted = pc.and_(keys["correct"], pc.equal(keys["iteration"], iteration))
            wanted = pc.and_(wanted, pc.is_in(keys["problem_id"], value_set=hard))
            pieces.append(file.take(wanted.combine_chunks()))
    selected = pa.concat_tables(pieces)
    experts = from_table(selected.sort_by([(name, "ascending") for name in KEY]))
    return _without_copies(experts) if deduplicate else experts


def _without_copies(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    first: dict[tuple[str, tuple[int, ...]], Trajectory] = {}
    for trajectory in trajectories:
        first.setdefault((trajectory.problem_id, trajectory.response_ids), trajectory)
    return list(first.values())
