"""The columns of a trajectory shard, and the way from trajectories to a table and back.

A shard is plain Parquet: DuckDB, pandas, Polars and Hugging Face datasets open it unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from struct import pack
from typing import Any

import numpy as np
import pyarrow as pa

from rloop_mcore.types import Trajectory

VERSION = 3
VERSION_KEY = b"rloop_mcore.trajectory.version"

KEY = ("iteration", "step", "problem_id", "sample")  # identifies a row; experts and digests are in its order

_RUN = pa.struct([pa.field("version", pa.int32(), nullable=False), pa.field("tokens", pa.int32(), nullable=False)])

SCHEMA = pa.schema(
    [
        pa.field("iteration", pa.int32(), nullable=False),
        pa.field("step", pa.int32(), nullable=False),
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("sample", pa.int32(), nullable=False),
        pa.field("group", pa.int32(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("response_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("logprobs", pa.list_(pa.float32()), nullable=False),  # of the behaviour policy, one a response id
        pa.field("prompt_tokens", pa.int32(), nullable=False),  # lengths of the lists above, for queries without them
        pa.field("response_tokens", pa.int32(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("weight_versions", pa.list_(_RUN), nullable=False),  # more than one: a sync fell into the generation
        pa.field("correct", pa.bool_(), nullable=False),
        pa.field("reward", pa.float64(), nullable=False),  # the very double the advantage was computed from
        pa.field("reason", pa.string(), nullable=False),
        pa.field("engine", pa.int32(), nullable=False),
    ],
    metadata={VERSION_KEY: str(VERSION).encode()},
)

# Beside a shard, under the same name: what differs from run to run of the same seed.
TIMES = pa.schema(
    [
        *(SCHEMA.field(name) for name in KEY),
        pa.field("started", pa.timestamp("ms", "UTC"), nullable=False),  # an engine was asked
        pa.field("generate_s", pa.float32(), nullable=False),  # until it had answered the call that this one was in
        pa.field("grade_s", pa.float32(), nullable=False),
    ]
)

_LISTS = {"prompt_ids": "i", "response_ids": "i", "logprobs": "f"}  # with the code of `struct` and NumPy
_LENGTHS = {"prompt_tokens": "prompt_ids", "response_tokens": "response_ids"}
FIELDS = [name for name in SCHEMA.names if name not in _LENGTHS]  # the columns that a trajectory has itself


def to_table(trajectories: Sequence[Trajectory]) -> pa.Table:
    """The trajectories as rows. Raises ValueError for one whose logprobs don't match its response."""
    for row in trajectories:
        if len(row.logprobs) != len(row.response_ids):
            raise ValueError(
                f"trajectory {row.key} has {len(row.response_ids)} response ids but {len(row.logprobs)} logprobs"
            )
    return pa.table([_column(trajectories, field) for field in SCHEMA], schema=SCHEMA)


def times_table(trajectories: Sequence[Trajectory]) -> pa.Table:
    """When the trajectories were made, as rows of TIMES."""
    keys = [[getattr(row, name) for row in trajectories] for name in KEY]
    started = [round(1000 * row.times.started) for row in trajectories]
    seconds = [[row.times.generate_s for row in trajectories], [row.times.grade_s for row in trajectories]]
    return pa.table([*keys, pa.array(started, TIMES.field("started").type), *seconds], schema=TIMES)


def from_table(table: pa.Table) -> list[Trajectory]:
    """The rows of a table with all columns of SCHEMA, in its order. Their times are not in it."""
    columns: dict[str, list[Any]] = {
        name: _tuples(table[name]) if name in _LISTS else table[name].to_pylist() for name in FIELDS
    }
    columns["weight_versions"] = [
        tuple((run["version"], run["tokens"]) for run in runs) for runs in columns["weight_versions"]
    ]
    return [Trajectory(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]


def with_large_lists(table: pa.Table) -> pa.Table:
    """The table with lists that may hold any number of values in all: 2^31 of one chunk are too many for the others."""
    fields = [
        field.with_type(pa.large_list(field.type.value_field)) if pa.types.is_list(field.type) else field
        for field in table.schema
    ]
    return table.cast(pa.schema(fields, table.schema.metadata))


def _column(trajectories: Sequence[Trajectory], field: pa.Field) -> pa.Array:
    if length_of := _LENGTHS.get(field.name):
        return pa.array([len(getattr(row, length_of)) for row in trajectories], field.type)
    values = [getattr(row, field.name) for row in trajectories]
    if field.name in _LISTS:
        return _list_array(values, field.type, _LISTS[field.name])
    if field.name == "weight_versions":
        values = [[{"version": version, "tokens": tokens} for version, tokens in runs] for runs in values]
    return pa.array(values, field.type)


def _list_array(values: Sequence[Sequence[float]], type_: pa.ListType, code: str) -> pa.ListArray:
    """A list column, several times faster than pa.array over nested sequences. struct.error beyond 32 bits."""
    offsets = np.fromiter(accumulate(map(len, values), initial=0), np.int32, len(values) + 1)
    packed = b"".join(pack(f"{len(row)}{code}", *row) for row in values)
    flat = np.frombuffer(packed, code)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat), type=type_)


def _tuples(column: pa.ChunkedArray) -> list[tuple]:
    """The lists of a column as tuples, several times faster than to_pylist."""
    tuples: list[tuple] = []
    for chunk in column.chunks:
        flat = chunk.values.to_numpy().tolist()
        ends = chunk.offsets.to_numpy().tolist()
        tuples.extend(tuple(flat[low:high]) for low, high in pairwise(ends))
    return tuples
