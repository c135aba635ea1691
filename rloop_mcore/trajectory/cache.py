"""The trajectory cache: every sampled trajectory of a run, in sealed shards listed by a manifest."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rloop_mcore.errors import UserError
from rloop_mcore.platform.files import fsync_path
from rloop_mcore.trajectory import digest, experts, manifest, reader, selection, summary
from rloop_mcore.trajectory.experts import ExpertSet
from rloop_mcore.trajectory.summary import Phase
from rloop_mcore.trajectory.writer import TIMES_FOLDER, write_shard
from rloop_mcore.types import ExpertQuery, Trajectory


class TrajectoryCache:
    """The cache in `directory`. Queries see what is sealed; opening and querying write nothing.

    A shard is durable before the manifest names it, and a manifest before the journal names the shard: a crash leaves
    at most files that nothing names, which `keep_only` removes. One writer at a time (the run directory's lock).

    Each seal rewrites the manifest, about 230 bytes a shard: fine for some thousand shards (a paper-size run of 600
    steps sealed every step has 140 kB).
    """

    def __init__(self, directory: Path) -> None:
        """Open the cache, a missing one as empty. Raises UserError naming shards that are missing or truncated."""
        self.directory = directory
        self._shards = manifest.read_manifest(directory)
        self._pending: list[Trajectory] = []
        if damage := reader.size_damage(directory, self._shards):
            raise UserError(
                f"the trajectory cache {directory} is damaged: {'; '.join(damage)}: restore the files from a copy."
            )

    def append(self, trajectories: Sequence[Trajectory]) -> None:
        """Take every sampled trajectory of a step; in memory until `seal`."""
        self._pending.extend(trajectories)

    def seal(self) -> list[str]:
        """Write what was appended as one shard, durably; returns the names of all shards, oldest first."""
        if self._pending:
            self._make_directory()
            shard = write_shard(self.directory / self._next_name(), self._pending)
            self._replace([*self._shards, shard])
            self._pending = []
        return [shard.name for shard in self._shards]

    def keep_only(self, shards: Sequence[str]) -> None:
        """Discard whatever a crash left that is not in `shards`. Raises UserError when one of those is not here."""
        names = {shard.name for shard in self._shards}
        if missing := [name for name in shards if name not in names]:
            raise UserError(
                f"the trajectory cache {self.directory} lacks {', '.join(missing)}, which the journal names: restore "
                "the folder from a copy, or start anew in another run.dir."
            )
        self._pending = []
        if names - set(shards):
            self._replace([shard for shard in self._shards if shard.name in shards])
        if self.directory.exists():
            self._remove_unnamed()

    def count(self) -> int:
        """Sealed trajectories."""
        return sum(shard.rows for shard in self._shards)

    def digest(self) -> str:
        """sha256 of the sealed content; see `digest.content_digest` for what it covers."""
        return digest.content_digest(self.directory, self._shards)

    def verify(self) -> list[str]:
        """Compare every shard with its checksum; one phrase a damaged shard, naming it. Reads every byte."""
        return reader.checksum_damage(self.directory, self._shards)

    def count_experts(self, query: ExpertQuery) -> int:
        """How many trajectories the query selects."""
        return len(selection.select_experts(self.directory, self._shards, query))

    def write_experts(self, query: ExpertQuery, folder: Path) -> dict[str, int]:
        """Make what the query selects the content of `folder`, durably; see `experts.write_experts`."""
        return experts.write_experts(self.directory, self._shards, query, folder)

    def experts(self, folder: Path) -> ExpertSet:
        """What `write_experts` wrote."""
        return ExpertSet(folder)

    def phases(self) -> list[Phase]:
        """What is sealed of each iteration's exploration."""
        return summary.phases(self.directory, self._shards)

    def rows(self, iteration: int | None = None, problem_id: str | None = None) -> Iterator[Trajectory]:
        """The sealed trajectories of an iteration and of a problem, or of all: a row group in memory at a time."""
        return summary.rows(self.directory, self._shards, iteration, problem_id)

    def bytes(self) -> int:
        """Of all shards."""
        return sum(shard.bytes for shard in self._shards)

    def success_histogram(self, iteration: int, bins: int = 10) -> list[int]:
        """Problems of the phase by success rate [bins].

        Bin b counts the rates in [b / bins, (b + 1) / bins); a rate of 1 is in the last.
        """
        histogram = [0] * bins
        for row in selection.success_counts(self.directory, self._shards, iteration).to_pylist():
            histogram[min(row["successes"] * bins // row["samples"], bins - 1)] += 1
        return histogram

    def _next_name(self) -> str:
        """The shard after the last one; a file of this name that nothing lists is replaced."""
        number = int(self._shards[-1].name[len("shard-") : -len(".parquet")]) + 1 if self._shards else 0
        return f"shard-{number:06d}.parquet"

    def _replace(self, shards: list[manifest.Shard]) -> None:
        manifest.write_manifest(self.directory, shards)
        self._shards = shards

    def _make_directory(self) -> None:
        if not self.directory.exists():
            self.directory.mkdir(parents=True)
            fsync_path(self.directory.parent)

    def _remove_unnamed(self) -> None:
        named = {manifest.NAME, TIMES_FOLDER, *(shard.name for shard in self._shards)}
        for folder in (self.directory, self.directory / TIMES_FOLDER):
            if folder.exists():
                for name in set(os.listdir(folder)) - named:
                    (folder / name).unlink()
                fsync_path(folder)
