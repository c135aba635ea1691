"""Writing a shard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from os import SEEK_END
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from rloop_mcore.platform.files import atomic_path
from rloop_mcore.trajectory.manifest import TIMES, Shard
from rloop_mcore.trajectory.schema import times_table, to_table
from rloop_mcore.types import Trajectory

ROW_GROUP = 1024  # rows; a selection reads the tokens of whole row groups, so this bounds its memory

PARQUET = {
    "compression": "zstd",
    "use_dictionary": [
        "problem_id",
        "prompt_ids.list.element",
        "response_ids.list.element",
        "finish_reason",
        "reason",
    ],
    "column_encoding": {"logprobs.list.element": "BYTE_STREAM_SPLIT"},
    "write_page_checksum": True,  # so that a query that meets a flipped bit says so
}


def stored_order(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """Successes first, those of the groups with the fewest of them before others, then by key.

    RFT wants the successes of hard problems: they share a few row groups so, and the others need not be read.
    """
    successes = Counter(_group(row) for row in trajectories if row.correct)
    return sorted(trajectories, key=lambda row: (not row.correct, row.correct and successes[_group(row)], row.key))


def _group(row: Trajectory) -> tuple[int, int, str, int]:
    return row.iteration, row.step, row.problem_id, row.group


def write_shard(path: Path, trajectories: Sequence[Trajectory]) -> Shard:
    """Write at least one trajectory as a Parquet file (zstd), atomically and durably; before it, its times."""
    rows = stored_order(trajectories)
    times = pa.BufferOutputStream()
    pq.write_table(times_table(rows), times, compression="zstd")
    with atomic_path(path.parent / TIMES / path.name) as temporary:
        temporary.write_bytes(times.getvalue())
    return write_table(path, to_table(rows))


def write_table(path: Path, table: pa.Table) -> Shard:
    """Write at least one row, in this order."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=ROW_GROUP, **PARQUET)
    content = sink.getvalue()
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    places = Counter(zip(table["iteration"].to_pylist(), table["step"].to_pylist(), strict=True))
    steps = tuple((*place, rows) for place, rows in sorted(places.items()))
    whole, footer = sha256(content).hexdigest(), footer_digest(pa.BufferReader(content))
    return Shard(path.name, len(table), content.size, whole, footer, steps, sealed_as=(path.name,))


def footer_digest(file: IO[bytes]) -> str:
    """sha256 of what tells a Parquet file's reader where everything is. Raises OSError where there is nothing such."""
    file.seek(-8, SEEK_END)  # four bytes of length, then the magic number
    length = int.from_bytes(file.read(4), "little")
    file.seek(-8 - length, SEEK_END)
    return sha256(file.read()).hexdigest()
