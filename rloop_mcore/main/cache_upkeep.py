"""`rloop cache --quarantine` and `--compact`: what changes a cache beside the runs, and the words for what was lost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rloop_mcore.journal import Journal
from rloop_mcore.main.run_directory import RunDirectory
from rloop_mcore.trajectory.cache import TrajectoryCache
from rloop_mcore.trajectory.compact import compact
from rloop_mcore.trajectory.manifest import QUARANTINE
from rloop_mcore.trajectory.quarantine import Loss, quarantine


def set_damaged_aside(run: RunDirectory) -> list[str]:
    """Set damaged shards aside; returns the account, line by line. Raises UserError while a run works in `run`."""
    with run.lock(), run.lock("lock.rank0"):  # a rank that was killed may still be on its way out
        shards = quarantine(run.cache)
        found = TrajectoryCache(run.cache)
    if not shards:
        return [f"{run.cache}: nothing is damaged"]
    return [
        *(f"{shard.name} {shard.lost}: {shard.rows} trajectories are lost" for shard in shards),
        *steps_lost(found.losses()),
        f"left: {found.count()} trajectories; what there is of the damaged files is in {run.cache / QUARANTINE}",
    ]


def merge_small(run: RunDirectory) -> list[str]:
    """Merge small shards; returns what to say. Raises UserError while a run works in `run`, or a shard is damaged."""
    with run.lock(), run.lock("lock.rank0"):  # a rank that was killed may still be on its way out
        TrajectoryCache(run.cache)  # refuses a cache that misses files
        before, after = compact(run.cache, Journal(run.journal).shards())
        found = TrajectoryCache(run.cache)
    return [f"{run.cache}: {found.count()} trajectories; shards: {before} before, {after} now"]


def steps_lost(losses: Sequence[Loss]) -> list[str]:
    """A line a step that lost trajectories."""
    return [
        f"lost of iteration {loss.iteration}, step {loss.step}: {loss.lost} of {loss.lost + loss.left} trajectories"
        for loss in losses
    ]


def iterations_lost(losses: Sequence[Loss]) -> list[str]:
    """A line an iteration that lost trajectories."""
    lines = []
    for iteration, group in groupby(losses, key=lambda loss: loss.iteration):
        steps = list(group)
        lost = sum(loss.lost for loss in steps)
        lines.append(f"lost of iteration {iteration}: {lost} trajectories of {len(steps)} steps (--verify lists them)")
    return lines
