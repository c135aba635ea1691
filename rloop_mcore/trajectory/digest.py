"""One digest for the content of a cache: what was sampled and how it was graded, not when or in which shard."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa

from rloop_mcore.trajectory.manifest import Shard
from rloop_mcore.trajectory.reader import ShardFile
from rloop_mcore.trajectory.schema import KEY

_DIGESTED = [*KEY, "prompt_ids", "response_ids", "logprobs", "correct", "reward"]


def content_digest(directory: Path, shards: Sequence[Shard]) -> str:
    """sha256 over the sha256 of every row, rows in KEY order.

    A row is hashed as the bytes of, one after the other and little-endian: iteration, step, sample (int32); length of
    the UTF-8 problem id, of the prompt and of the response (int32); the problem id; prompt ids and response ids
    (int32); logprobs (float32); correct (one byte); reward (float64). All other columns are left out.
    """
    keys, rows = [], []
    for shard in shards:
        for table in ShardFile(directory, shard).row_groups(_DIGESTED):
            rows.extend(_row_digests(table.combine_chunks()))
            keys.append(table.select(KEY))
    if not rows:
        return sha256().hexdigest()
    order = pa.concat_tables(keys).append_column("row", pa.array(np.arange(len(rows))))
    order = order.sort_by([(name, "ascending") for name in (*KEY, "row")])
    total = sha256()
    for row in order["row"].to_pylist():
        total.update(rows[row])
    return total.hexdigest()


def _row_digests(table: pa.Table) -> list[bytes]:
    numbers = np.column_stack([table[name].to_numpy() for name in ("iteration", "step", "sample")])
    problems = [problem.encode() for problem in table["problem_id"].to_pylist()]
    lists = [_buffers(table[name]) for name in ("prompt_ids", "response_ids", "logprobs")]
    correct = table["correct"].to_numpy().astype("u1")
    reward = table["reward"].to_numpy().astype("<f8")
    digests = []
    for row, problem in enumerate(problems):
        prompt, response, logprobs = (values[ends[row] : ends[row + 1]] for values, ends in lists)
        head = np.array([*numbers[row], len(problem), len(prompt), len(response)], dtype="<i4")
        content = (head.tobytes(), problem, prompt.tobytes(), response.tobytes(), logprobs.tobytes())
        digests.append(sha256(b"".join(content) + correct[row].tobytes() + reward[row].tobytes()).digest())
    return digests


def _buffers(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The flat 4-byte values of a list column of one chunk, and each row's bounds in them."""
    chunk = column.chunk(0)
    return chunk.values.to_numpy().astype(chunk.values.to_numpy().dtype.newbyteorder("<")), chunk.offsets.to_numpy()
