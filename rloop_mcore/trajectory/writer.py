"""Writing a shard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rloop_mcore.platform.files import atomic_path
from rloop_mcore.trajectory.manifest import Shard
from rloop_mcore.trajectory.schema import times_table, to_table
from rloop_mcore.types import Trajectory

ROW_GROUP = 1024  # rows; a selection reads the tokens of whole row groups, so this bounds its memory

TIMES_FOLDER = "times"

_DICTIONARY = ["problem_id", "prompt_ids.list.element", "response_ids.list.element", "finish_reason", "reason"]


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
    with atomic_path(path.parent / TIMES_FOLDER / path.name) as temporary:
        pq.write_table(times_table(rows), temporary, compression="zstd")
    return write_table(path, to_table(rows))


def write_table(path: Path, table: pa.Table) -> Shard:
    """Write at least one row, in this order."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        row_group_size=ROW_GROUP,
        use_dictionary=_DICTIONARY,
        column_encoding={"logprobs.list.element": "BYTE_STREAM_SPLIT"},
        write_page_checksum=True,  # so that a query that meets a flipped bit says so
    )
    content = sink.getvalue()
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    places = set(zip(table["iteration"].to_pylist(), table["step"].to_pylist(), strict=True))
    return Shard(path.name, len(table), content.size, sha256(content).hexdigest(), first=min(places), last=max(places))
