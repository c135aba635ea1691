"""Damaged shards: set aside, so that a run can go on without them, with an exact account of what is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rloop_mcore.trajectory.manifest import Shard, discard_unnamed, read_manifest, write_manifest
from rloop_mcore.trajectory.reader import checksum_damage


@dataclass(frozen=True, slots=True)
class Loss:
    """What a step of an exploration lost: trajectories that are gone, and that are left."""

    iteration: int
    step: int
    lost: int
    left: int


def quarantine(directory: Path) -> list[Shard]:
    """List the damaged shards of the cache as lost and move their files to `quarantine/`; returns these shards.

    Reads every byte. The manifest comes first: before it is replaced nothing has changed, from then on the shards are
    lost, and a file that a crash left in place is moved by the next start. The caller holds the run directory's lock.
    Raises UserError when the manifest itself is damaged.
    """
    shards, damaged = [], []
    for shard in read_manifest(directory):
        if not shard.lost and (wrong := checksum_damage(directory, shard)):
            shard = replace(shard, lost=wrong)
            damaged.append(shard)
        shards.append(shard)
    if damaged:
        write_manifest(directory, shards)
    if directory.exists():
        discard_unnamed(directory, shards)
    return damaged


def losses(shards: Sequence[Shard]) -> list[Loss]:
    """The steps that lost trajectories, in order."""
    lost: Counter[tuple[int, int]] = Counter()
    left: Counter[tuple[int, int]] = Counter()
    for shard in shards:
        for iteration, step, rows in shard.steps:
            (lost if shard.lost else left)[iteration, step] += rows
    return [Loss(*place, lost[place], left[place]) for place in sorted(lost)]
