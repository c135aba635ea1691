"""The columns of a trajectory shard, and the way from trajectories to a table and back.

A shard is plain Parquet: DuckDB, pandas, Polars and Hugging Face datasets open it unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain, pairwise

import numpy as np
import pyarrow as pa

from rloop_mcore.types import Trajectory

VERSION = 2
VERSION_KEY = b"rloop_mcore.trajectory.version"

KEY = ("iteration", "step", "problem_id", "sample")  # identifies a row, and is the order of everything read

_RUN = pa.struct([pa.field("version", pa.int32(), nullable=False), pa.field("tokens", pa.int32(), nullable=False)])

SCHEMA = pa.schema(
    [
        pa.field("iteration", pa.int32(), nullable=False),
        pa.field("step", pa.int32(), nullable=False),
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("logprobs", pa.list_(pa.float32()), nullable=False),  # of the behaviour policy, one a response id
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("weight_versions", pa.list_(_RUN), nullable=False),  # more than one: a sync fell into the generation
        pa.field("correct", pa.bool_(), nullable=False),
        pa.field("reward", pa.float64(), nullable=False),  # the very double the advantage was computed from
        pa.field("reason", pa.string(), nullable=False),
    ],
    metadata={VERSION_KEY: str(VERSION).encode()},
)

_LISTS = ("prompt_ids", "response_ids", "logprobs")


def to_table(trajectories: Sequence[Trajectory]) -> pa.Table:
    """The trajectories as rows, in KEY order. Raises ValueError for one whose logprobs don't match its response."""
    rows = sorted(trajectories, key=lambda row: row.key)
    for row in rows:
        if len(row.logprobs) != len(row.response_ids):
            raise ValueError(
                f"trajectory {row.key} has {len(row.response_ids)} response ids but {len(row.logprobs)} logprobs"
            )
    columns = []
    for field in SCHEMA:
        values = [getattr(row, field.name) for row in rows]
        if field.name == "weight_versions":
            values = [[{"version": version, "tokens": tokens} for version, tokens in runs] for runs in values]
        columns.append(_list_array(values, field.type) if field.name in _LISTS else pa.array(values, field.type))
    return pa.table(columns, schema=SCHEMA)


def from_table(table: pa.Table) -> list[Trajectory]:
    """The rows of a table with all columns of SCHEMA, in its order."""
    columns = [_tuples(table.column(f.name)) if f.name in _LISTS else table.column(f.name).to_pylist() for f in SCHEMA]
    versions = SCHEMA.names.index("weight_versions")
    columns[versions] = [tuple((run["version"], run["tokens"]) for run in runs) for runs in columns[versions]]
    return [Trajectory(**dict(zip(SCHEMA.names, row, strict=True))) for row in zip(*columns, strict=True)]


def _list_array(values: Sequence[Sequence[float]], type_: pa.ListType) -> pa.ListArray:
    """A list column, several times faster than pa.array over nested sequences. OverflowError beyond 32 bits."""
    offsets = np.fromiter(accumulate(map(len, values), initial=0), np.int32, len(values) + 1)
    flat = np.fromiter(chain.from_iterable(values), type_.value_type.to_pandas_dtype(), offsets[-1])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat), type=type_)


def _tuples(column: pa.ChunkedArray) -> list[tuple]:
    """The lists of a column as tuples, several times faster than to_pylist."""
    tuples: list[tuple] = []
    for chunk in column.chunks:
        flat = chunk.values.to_numpy().tolist()
        ends = chunk.offsets.to_numpy().tolist()
        tuples.extend(tuple(flat[low:high]) for low, high in pairwise(ends))
    return tuples
