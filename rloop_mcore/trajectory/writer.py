"""Writing a shard."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rloop_mcore.platform.files import atomic_path
from rloop_mcore.trajectory.manifest import Shard
from rloop_mcore.trajectory.schema import to_table
from rloop_mcore.types import Trajectory

ROW_GROUP = 1024  # rows; a selection reads the tokens of whole row groups, so this bounds its memory

_DICTIONARY = ["problem_id", "prompt_ids.list.element", "response_ids.list.element", "finish_reason", "reason"]


def write_shard(path: Path, trajectories: Sequence[Trajectory]) -> Shard:
    """Write at least one trajectory as a Parquet file (zstd), atomically and durably."""
    table = to_table(trajectories)
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
    places = list(zip(table["iteration"].to_pylist(), table["step"].to_pylist(), strict=True))
    return Shard(path.name, len(table), content.size, sha256(content).hexdigest(), first=places[0], last=places[-1])
