"""Merging the many small shards of short steps into few large ones; the rows stay what they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from hashlib import file_digest, sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rloop_mcore.platform.files import atomic_path
from rloop_mcore.platform.parquet import read_footer
from rloop_mcore.trajectory import writer
from rloop_mcore.trajectory.manifest import Shard, discard_unnamed, read_manifest, write_manifest
from rloop_mcore.trajectory.reader import ShardFile, checksum_damage, damaged
from rloop_mcore.trajectory.schema import SCHEMA

ROWS = 65_536  # of a merged shard at most: some 256 MB of responses of 800 tokens


def compact(directory: Path, committed: Collection[str]) -> tuple[int, int]:
    """Merge neighbouring shards of one iteration up to ROWS rows; returns how many shards there were and are.

    Only shards among `committed`, the names in the journal: others the next start may have to drop. A merge is whole
    in one replacement of the manifest; a crash leaves the shards before it or after it, and files that the next start
    removes. A row group is in memory at a time. The caller holds the run directory's lock.

    Raises UserError, having merged only what is sound, when a shard is damaged.
    """
    shards = read_manifest(directory)
    before = _present(shards)
    for group in _groups(shards, set(committed)):
        if wrong := [f"{shard.name} {damage}" for shard in group if (damage := checksum_damage(directory, shard))]:
            raise damaged(directory, wrong)
        first = shards.index(group[0])
        shards[first : first + len(group)] = [_merge(directory, group)]
        write_manifest(directory, shards)
        discard_unnamed(directory, shards)
    return before, _present(shards)


def _present(shards: Sequence[Shard]) -> int:
    return sum(not shard.lost for shard in shards)


def _groups(shards: Sequence[Shard], committed: set[str]) -> list[list[Shard]]:
    """Neighbours that become one shard. By rows, which a merge leaves as they are: so a second time there is none."""
    groups: list[list[Shard]] = [[]]
    for shard in shards:
        group = groups[-1]
        iterations = {iteration for member in (*group, shard) for iteration, _, _ in member.steps}
        if shard.lost or not committed.issuperset(shard.sealed_as):
            groups.append([])
        elif len(iterations) > 1 or sum(member.rows for member in group) + shard.rows > ROWS:
            groups.append([shard])
        else:
            group.append(shard)
    return [group for group in groups if len(group) > 1]


def _merge(directory: Path, group: Sequence[Shard]) -> Shard:
    """Write the rows of the shards, one after the other, as one file."""
    sealed_as = tuple(name for shard in group for name in shard.sealed_as)
    path = directory / f"{sealed_as[0].removesuffix('.parquet')}-{sealed_as[-1].removeprefix('shard-')}"
    with atomic_path(path) as temporary:
        with open(temporary, "wb") as file, pq.ParquetWriter(file, SCHEMA, **writer.PARQUET) as out:
            for table in _row_groups(directory, group):
                out.write_table(table)
        with open(temporary, "rb") as written:
            whole = file_digest(written, "sha256").hexdigest()
            footer = sha256(read_footer(written)).hexdigest()
        size = temporary.stat().st_size
    places: Counter[tuple[int, int]] = Counter()
    for shard in group:
        for iteration, step, count in shard.steps:
            places[iteration, step] += count
    steps = tuple((*place, count) for place, count in sorted(places.items()))
    return Shard(path.name, sum(shard.rows for shard in group), size, whole, footer, steps, sealed_as)


def _row_groups(directory: Path, group: Sequence[Shard]) -> Iterator[pa.Table]:
    """The rows in pieces of ROW_GROUP; the last may have fewer."""
    rest = SCHEMA.empty_table()
    for shard in group:
        for table in ShardFile(directory, shard).row_groups():
            rest = pa.concat_tables([rest, table])
            while len(rest) >= writer.ROW_GROUP:
                yield rest.slice(0, writer.ROW_GROUP)
                rest = rest.slice(writer.ROW_GROUP)
    if len(rest):
        yield rest
