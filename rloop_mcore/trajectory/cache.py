"""The trajectory cache: every sampled trajectory of a run, in sealed shards listed by a manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from rloop_mcore.errors import UserError
from rloop_mcore.platform.files import fsync_path
from rloop_mcore.trajectory import digest, experts, manifest, quarantine, reader, selection, summary
from rloop_mcore.trajectory.experts import ExpertSet
from rloop_mcore.trajectory.manifest import Shard
from rloop_mcore.trajectory.quarantine import Loss
from rloop_mcore.trajectory.summary import Phase
from rloop_mcore.trajectory.writer import Encoded, encode, write_shard
from rloop_mcore.types import ExpertQuery, Trajectory, Visit


class TrajectoryCache:
    """The cache in `directory`. Queries see what is sealed; opening and querying write nothing.

    A shard is durable before the manifest names it, and a manifest before the journal names the shard: a crash leaves
    at most files that nothing names, which `keep_only` removes. One writer at a time (the run directory's lock).

    Each seal rewrites the manifest, about 300 bytes a shard: fine for some thousand shards (a paper-size run of 600
    steps sealed every step has 180 kB).
    """

    def __init__(self, directory: Path) -> None:
        """Open the cache, a missing one as empty. Raises UserError naming shards that are missing or truncated."""
        self.directory = directory
        self._listed = manifest.read_manifest(directory)
        self._pending: list[Future[Encoded]] = []
        self._encoder = ThreadPoolExecutor(1, "trajectory cache")
        if damage := self._damage(reader.size_damage):
            raise reader.damaged(directory, damage)

    def append(self, trajectories: Sequence[Trajectory]) -> None:
        """Take every sampled trajectory of a step; in memory until `seal`.

        They are made a shard on a thread: it has the time of the step's updates for that.
        """
        if trajectories:
            self._pending.append(self._encoder.submit(encode, tuple(trajectories)))

    def seal(self) -> list[str]:
        """Write what was appended, a shard a time, durably; returns the names of all seals, oldest first.

        Those of lost shards and of shards that were merged into others too.
        """
        if self._pending:
            self._make_directory()
            first = self._next_number()
            names = [f"shard-{number:06d}.parquet" for number in range(first, first + len(self._pending))]
            encoded = [future.result() for future in self._pending]
            new = [write_shard(self.directory / name, shard) for name, shard in zip(names, encoded, strict=True)]
            self._replace([*self._listed, *new])
            self._pending = []
        return [name for shard in self._listed for name in shard.sealed_as]

    def check_holds(self, shards: Sequence[str]) -> None:
        """Raises UserError when one of `shards`, names of seals, is not here: as it was, merged, or listed as lost."""
        if missing := set(shards).difference(*(shard.sealed_as for shard in self._listed)):
            raise UserError(
                f"the trajectory cache {self.directory} lacks {', '.join(sorted(missing))}, which the journal names: "
                "restore the folder from a copy, or start anew in another run.dir."
            )

    def keep_only(self, shards: Sequence[str]) -> None:
        """Discard whatever a crash left that is not in `shards`, the names of seals.

        Raises UserError as `check_holds` does, and when one was merged with one that would have to be discarded.
        """
        self.check_holds(shards)
        wanted = set(shards)
        kept = [shard for shard in self._listed if not wanted.isdisjoint(shard.sealed_as)]
        for shard in kept:
            if more := set(shard.sealed_as) - wanted:
                raise UserError(
                    f"{self.directory / shard.name} was merged from shards of which the journal no longer names "
                    f"{', '.join(sorted(more))}: restore journal.jsonl as it was when they were merged."
                )
        self._pending = []
        if len(kept) < len(self._listed):
            self._replace(kept)
        if self.directory.exists():
            manifest.discard_unnamed(self.directory, self._listed)

    def losses(self) -> list[Loss]:
        """The steps that lost trajectories with shards that were set aside, in order."""
        return quarantine.losses(self._listed)

    def count(self) -> int:
        """Sealed trajectories."""
        return sum(shard.rows for shard in self._shards)

    def digest(self) -> str:
        """sha256 of the sealed content; see `digest.content_digest` for what it covers."""
        return digest.content_digest(self.directory, self._shards)

    def verify(self) -> list[str]:
        """Compare every shard with its checksum; one phrase a damaged shard, naming it. Reads every byte."""
        return self._damage(reader.checksum_damage)

    def count_experts(self, query: ExpertQuery) -> int:
        """How many trajectories the query selects."""
        return selection.count_experts(self.directory, self._shards, query)

    def visits(self) -> list[tuple[str, Visit]]:
        """How every problem (by id) went in every RL step, in the order of the steps."""
        return summary.visits(self.directory, self._shards)

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

    def success_histogram(self, iteration: int) -> list[int]:
        """Problems of the phase by success rate [10]: bin b counts those in [b / 10, (b + 1) / 10), the last 1 too."""
        successes, samples = selection.success_counts(self.directory, self._shards, iteration)
        return np.bincount(np.minimum(successes * 10 // samples, 9), minlength=10).tolist()

    @property
    def _shards(self) -> list[Shard]:
        """Those that are there."""
        return [shard for shard in self._listed if not shard.lost]

    def _damage(self, of: Callable[[Path, Shard], str]) -> list[str]:
        return [f"{shard.name} {wrong}" for shard in self._shards if (wrong := of(self.directory, shard))]

    def _next_number(self) -> int:
        """Of the shard after the last one; a file of its name that nothing lists is replaced."""
        return int(self._listed[-1].sealed_as[-1][len("shard-") : -len(".parquet")]) + 1 if self._listed else 0

    def _replace(self, shards: list[Shard]) -> None:
        manifest.write_manifest(self.directory, shards)
        self._listed = shards

    def _make_directory(self) -> None:
        if not self._listed:  # one that is there may be what a kill left before it was durable
            self.directory.mkdir(parents=True, exist_ok=True)
            fsync_path(self.directory.parent)
