"""Reading Parquet files of anybody's: damage is an error that names the file, and never other content."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from os import SEEK_END
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from rloop_mcore.errors import UserError


@contextmanager
def open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """The file, for reads within the block; pages that have a checksum are compared with it.

    Raises UserError where it is missing or damaged, on opening it or on reading.
    """
    try:
        with (
            pa.OSFile(os.fsencode(path)) as opened,  # a text would be taken for UTF-8
            pq.ParquetFile(opened, page_checksum_verification=True) as file,
        ):
            yield file
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a string that is not UTF-8
        raise UserError(f"{path} is missing or damaged, or not a Parquet file ({error}).") from error


def read_footer(file: IO[bytes]) -> bytes:
    """What tells a Parquet file's reader where everything is. Raises OSError where there is nothing such."""
    file.seek(-8, SEEK_END)  # four bytes of length, then the magic number
    length = int.from_bytes(file.read(4), "little")
    file.seek(-8 - length, SEEK_END)
    return file.read()
