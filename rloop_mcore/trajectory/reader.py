"""Reading shards, and finding what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from hashlib import file_digest
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rloop_mcore.errors import UserError
from rloop_mcore.trajectory.manifest import Shard
from rloop_mcore.trajectory.schema import SCHEMA, VERSION, VERSION_KEY

_GROUPS = 16  # row groups read at once: some 100 MB of long responses


class ShardFile:
    """An open shard; columns are read when asked for."""

    def __init__(self, directory: Path, shard: Shard) -> None:
        """Raises UserError when the file can't be read or has another schema version."""
        self.path = directory / shard.name
        try:
            self._file = pq.ParquetFile(self.path, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.path} is no readable Parquet file ({error}): restore it from a copy.") from error
        version = (self._file.schema_arrow.metadata or {}).get(VERSION_KEY, b"?").decode()
        if version != str(VERSION):
            raise UserError(f"{self.path} has trajectory schema version {version}; this rloop reads version {VERSION}.")

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Some columns of all rows."""
        return self._read(range(self._file.num_row_groups), columns)

    def row_groups(self, columns: Sequence[str] = SCHEMA.names) -> Iterator[pa.Table]:
        """The row groups one by one: no more than one is in memory."""
        for group in range(self._file.num_row_groups):
            yield self._read([group], columns)

    def rows_where(
        self, columns: Sequence[str], condition: Callable[[pa.Table], pa.BooleanArray]
    ) -> Iterator[pa.Table]:
        """All columns of the rows that `condition` [rows] chooses by `columns`, row group by row group.

        Of a group without any, nothing else is read.
        """
        for group in range(self._file.num_row_groups):
            wanted = condition(self._read([group], columns))
            if wanted.true_count:
                yield self._read([group], SCHEMA.names).filter(wanted)

    def take(self, mask: pa.BooleanArray) -> pa.Table:
        """All columns of the rows where `mask` [rows]; row groups without any are not read."""
        chosen, masks, start = [], [], 0
        for group in range(self._file.num_row_groups):
            rows = self._file.metadata.row_group(group).num_rows
            piece = mask.slice(start, rows)
            start += rows
            if piece.true_count:
                chosen.append(group)
                masks.append(piece)
        pieces = []
        for first in range(0, len(chosen), _GROUPS):
            part = slice(first, first + _GROUPS)
            pieces.append(self._read(chosen[part], SCHEMA.names).filter(pa.chunked_array(masks[part])))
        return pa.concat_tables(pieces) if pieces else SCHEMA.empty_table()

    def _read(self, groups: Sequence[int], columns: Sequence[str]) -> pa.Table:
        try:
            return self._file.read_row_groups(list(groups), columns=list(columns), use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.path} is damaged ({error}): restore it from a copy.") from error


def size_damage(directory: Path, shards: Sequence[Shard]) -> list[str]:
    """What is visibly wrong, one phrase a shard, without reading any: missing, or of another size than sealed."""
    damage = []
    for shard in shards:
        try:
            size = (directory / shard.name).stat().st_size
        except FileNotFoundError:
            damage.append(f"{shard.name} is missing")
            continue
        if size != shard.bytes:
            damage.append(f"{shard.name} has {size} bytes instead of {shard.bytes}")
    return damage


def checksum_damage(directory: Path, shards: Sequence[Shard]) -> list[str]:
    """Everything wrong, one phrase a shard; reads every byte."""
    damage = size_damage(directory, shards)
    sound = [shard for shard in shards if not any(phrase.startswith(shard.name) for phrase in damage)]
    for shard in sound:
        with open(directory / shard.name, "rb") as file:
            if file_digest(file, "sha256").hexdigest() != shard.sha256:
                damage.append(f"{shard.name} has another content than was sealed (its sha256 is wrong)")
    return damage
