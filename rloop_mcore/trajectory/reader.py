"""Reading shards, and finding what is wrong with them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from hashlib import file_digest, sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rloop_mcore.errors import UserError
from rloop_mcore.platform.parquet import read_footer
from rloop_mcore.trajectory.manifest import Shard
from rloop_mcore.trajectory.schema import SCHEMA, VERSION, VERSION_KEY

_REMEDY = "restore it from a copy, or set it aside as docs/cache.md says"


class ShardFile:
    """A shard; it is opened for each read, so that any number of them are at hand."""

    def __init__(self, directory: Path, shard: Shard) -> None:
        """Raises UserError when the file has another end than was sealed, or another schema version."""
        self.path = directory / shard.name
        try:
            with open(self.path, "rb", buffering=0) as file:
                footer = read_footer(file)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EINVAL):  # EINVAL: a seek before the start of a short file
                raise UserError(f"{self.path} cannot be read ({error.strerror}).") from error
            footer = b""
        if sha256(footer).hexdigest() != shard.footer:
            raise UserError(f"{self.path} is damaged (its footer is missing or changed): {_REMEDY}.")
        self._metadata = pq.read_metadata(pa.BufferReader(footer))
        version = self._metadata.metadata.get(VERSION_KEY, b"?").decode()
        if version != str(VERSION):
            raise UserError(f"{self.path} has trajectory schema version {version}; this rloop reads version {VERSION}.")

    def read(self, columns: Sequence[str], dictionary: Sequence[str] = ()) -> pa.Table:
        """Some columns of all rows; those strings that are also in `dictionary` as numbers into their values."""
        return self._read(range(self._metadata.num_row_groups), columns, dictionary)

    def row_groups(self, columns: Sequence[str] = SCHEMA.names) -> Iterator[pa.Table]:
        """The row groups one by one: no more than one is in memory."""
        for group in range(self._metadata.num_row_groups):
            yield self._read([group], columns)

    def rows_where(
        self, columns: Sequence[str], condition: Callable[[pa.Table], pa.BooleanArray]
    ) -> Iterator[pa.Table]:
        """All columns of the rows that `condition` [rows] chooses by `columns`, row group by row group.

        Of a group without any, nothing else is read.
        """
        for group in range(self._metadata.num_row_groups):
            wanted = condition(self._read([group], columns))
            if wanted.true_count:
                yield self._read([group], SCHEMA.names).filter(wanted)

    def take(self, wanted: np.ndarray, columns: Sequence[str] = SCHEMA.names) -> pa.Table:
        """Some columns, or all, of the rows that are `wanted` [rows]; row groups without any are not read."""
        pieces, start = [SCHEMA.empty_table().select(list(columns))], 0
        for group in range(self._metadata.num_row_groups):
            mine = wanted[start : start + self._metadata.row_group(group).num_rows]
            start += len(mine)
            if mine.any():
                pieces.append(self._read([group], columns).filter(pa.array(mine)))
        return pa.concat_tables(pieces)

    def _read(self, groups: Sequence[int], columns: Sequence[str], dictionary: Sequence[str] = ()) -> pa.Table:
        settings = {"page_checksum_verification": True, "pre_buffer": False, "read_dictionary": list(dictionary)}
        try:
            with (
                pa.OSFile(os.fsencode(self.path)) as file,  # a text would be taken for UTF-8
                pq.ParquetFile(file, metadata=self._metadata, **settings) as parquet,
            ):
                return parquet.read_row_groups(list(groups), columns=list(columns), use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.path} is damaged ({error}): {_REMEDY}.") from error


def damaged(directory: Path, damage: Sequence[str]) -> UserError:
    """The refusal of a cache with these damages, a phrase a shard."""
    return UserError(
        f"the trajectory cache {directory} is damaged: {'; '.join(damage)}: restore the files from a copy, or set them "
        f"aside with `rloop cache {directory.parent} --quarantine`, which says what is lost with them."
    )


def size_damage(directory: Path, shard: Shard) -> str:
    """What is visibly wrong with a shard, without reading it: missing, or of another size; "" if nothing."""
    try:
        size = (directory / shard.name).stat().st_size
    except FileNotFoundError:
        return "is missing"
    return "" if size == shard.bytes else f"has {size} bytes instead of {shard.bytes}"


def checksum_damage(directory: Path, shard: Shard) -> str:
    """Whatever is wrong with a shard; "" if nothing. Reads every byte."""
    if wrong := size_damage(directory, shard):
        return wrong
    try:
        with open(directory / shard.name, "rb") as file:
            intact = file_digest(file, "sha256").hexdigest() == shard.sha256
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "" if intact else "has another content than was sealed (its sha256 is wrong)"
