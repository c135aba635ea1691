"""The columns of a run's trajectory cache that need no tokens: which sample, right or wrong, and how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rloop_mcore.errors import UserError
from rloop_mcore.platform.files import parse_json
from rloop_mcore.platform.parquet import open_parquet, read_footer

_BATCH = 1024  # rows
_SCHEMA = pa.schema(
    [
        ("iteration", pa.int32()),
        ("step", pa.int32()),
        ("problem_id", pa.string()),
        ("sample", pa.int32()),
        ("correct", pa.bool_()),
        ("response_tokens", pa.int32()),
    ]
)


@dataclass(frozen=True, slots=True)
class Samples:
    """A row a trajectory, in the order of the shards; all arrays are [rows].

    `problem` are indices into `problems`; `shard` into `shards`, `row` the place in that shard. `iteration` and `step`
    count from 0.
    """

    shards: list[Path]
    problems: list[str]
    shard: np.ndarray
    row: np.ndarray
    iteration: np.ndarray
    step: np.ndarray
    problem: np.ndarray
    sample: np.ndarray
    correct: np.ndarray
    length: np.ndarray

    def __len__(self) -> int:
        return len(self.step)


def shard_paths(folder: Path) -> list[Path]:
    """The shards that a manifest.json lists, oldest first, but those that were set aside. Raises UserError."""
    return list(_footers(folder))


def _footers(folder: Path) -> dict[Path, str]:
    """The shards, each with the sha256 of its footer, which has no checksum in the file itself."""
    manifest = folder / "manifest.json"
    if not manifest.exists():
        return {}
    try:
        entries = parse_json(manifest.read_bytes())["shards"]
        return {folder / entry["name"]: entry["footer"] for entry in entries if not entry.get("lost")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{manifest} is not the manifest of a trajectory cache ({error!r})") from error


def read_samples(folder: Path) -> Samples:
    """The trajectories of a cache, or of an expert set; none where there is none. Raises UserError for damage."""
    footers = _footers(folder)
    shards, tables = list(footers), [_read(path, footer) for path, footer in footers.items()]
    table = pa.concat_tables([_SCHEMA.empty_table(), *tables])
    coded = table["problem_id"].combine_chunks().dictionary_encode()
    lengths = [len(each) for each in tables]
    columns = {name: table[name].to_numpy() for name in _SCHEMA.names if name != "problem_id"}
    return Samples(
        shards=shards,
        problems=coded.dictionary.to_pylist(),
        shard=np.repeat(np.arange(len(shards)), lengths),
        row=np.concatenate([np.arange(length) for length in lengths]) if lengths else np.empty(0, np.int64),
        problem=coded.indices.to_numpy(),
        length=columns.pop("response_tokens"),
        **columns,
    )


def read_rows(path: Path, rows: Sequence[int], columns: Sequence[str] | None = None) -> dict[int, dict[str, Any]]:
    """Some columns of some rows of a Parquet file, or all columns, by row.

    Only the row groups that hold them are read, a batch at a time: a file may be larger than the memory.
    """
    wanted, found, start = np.unique(rows), dict[int, dict[str, Any]](), 0
    with open_parquet(path) as file:
        for group in range(file.metadata.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            held = ((wanted >= start) & (wanted < end)).any()
            for batch in file.iter_batches(_BATCH, [group], columns) if held else ():
                mine = wanted[(wanted >= start) & (wanted < start + len(batch))]
                found.update(zip(mine.tolist(), batch.take(pa.array(mine - start)).to_pylist(), strict=True))
                start += len(batch)
            start = end
    return found


def _read(path: Path, footer: str) -> pa.Table:
    with open_parquet(path) as file:
        with open(path, "rb") as content:
            if sha256(read_footer(content)).hexdigest() != footer:
                raise UserError(f"{path} is damaged (its footer is changed): see docs/cache.md.")
        return file.read(columns=_SCHEMA.names).cast(_SCHEMA)
