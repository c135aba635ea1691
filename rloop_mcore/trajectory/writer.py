"""Writing a shard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rloop_mcore.platform.files import atomic_path
from rloop_mcore.platform.parquet import read_footer
from rloop_mcore.trajectory.manifest import TIMES_FOLDER, Shard
from rloop_mcore.trajectory.schema import SCHEMA, times_table, to_table
from rloop_mcore.types import Trajectory

# Rows in a row group. A selection reads the tokens of whole ones: the first two, where the rare successes are, are
# small. It reads the small columns of all, which takes a while for each: the others are large.
ROW_GROUP = 1024
LARGE_ROW_GROUP = 8192

# Only tokens are compressed. Of other columns a dictionary leaves little, and a selection, which reads all their pages,
# spent as much time on decompressing as on the rest.
_TOKENS = ["prompt_ids.list.element", "response_ids.list.element", "logprobs.list.element"]
_NESTED = [*_TOKENS, "weight_versions.list.element.version", "weight_versions.list.element.tokens"]
_COLUMNS = [*(field.name for field in SCHEMA if not pa.types.is_nested(field.type)), *_NESTED]

PARQUET = {
    "compression": dict.fromkeys(_TOKENS, "zstd"),
    "use_dictionary": [column for column in _COLUMNS if not column.startswith("logprobs")],
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


@dataclass(frozen=True)
class Encoded:
    """A shard in memory: the bytes of its file and of its times, and what the manifest is to say of it."""

    content: pa.Buffer
    times: pa.Buffer | None
    rows: int
    sha256: str
    footer: str
    steps: tuple[tuple[int, int, int], ...]


def encode(trajectories: Sequence[Trajectory]) -> Encoded:
    """At least one trajectory as a Parquet file (zstd). Raises ValueError for one that contradicts itself."""
    rows = stored_order(trajectories)
    times = pa.BufferOutputStream()
    pq.write_table(times_table(rows), times, compression="zstd")
    return replace(encode_table(to_table(rows)), times=times.getvalue())


def encode_table(table: pa.Table) -> Encoded:
    """At least one row, in this order."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, **PARQUET) as out:
        out.write_table(table.slice(0, 2 * ROW_GROUP), row_group_size=ROW_GROUP)
        if len(table) > 2 * ROW_GROUP:
            out.write_table(table.slice(2 * ROW_GROUP), row_group_size=LARGE_ROW_GROUP)
    content = sink.getvalue()
    places = Counter(zip(table["iteration"].to_pylist(), table["step"].to_pylist(), strict=True))
    steps = tuple((*place, rows) for place, rows in sorted(places.items()))
    whole, footer = sha256(content).hexdigest(), sha256(read_footer(pa.BufferReader(content))).hexdigest()
    return Encoded(content, None, len(table), whole, footer, steps)


def write_shard(path: Path, shard: Encoded) -> Shard:
    """Write the file atomically and durably; before it, its times."""
    if shard.times is not None:
        with atomic_path(path.parent / TIMES_FOLDER / path.name) as temporary:
            temporary.write_bytes(shard.times)
    with atomic_path(path) as temporary:
        temporary.write_bytes(shard.content)
    return Shard(path.name, shard.rows, shard.content.size, shard.sha256, shard.footer, shard.steps, (path.name,))
