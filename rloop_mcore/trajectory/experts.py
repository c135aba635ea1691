"""D_expert as files: what RFT is trained on, written once, with where it came from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import overload

import pyarrow as pa

from rloop_mcore.errors import UserError
from rloop_mcore.platform.files import new_directory
from rloop_mcore.trajectory import selection
from rloop_mcore.trajectory.manifest import NAME, Shard, read_manifest, write_manifest
from rloop_mcore.trajectory.reader import ShardFile, size_damage
from rloop_mcore.trajectory.schema import with_large_lists
from rloop_mcore.trajectory.writer import encode_table, write_shard
from rloop_mcore.types import Example, ExpertQuery

LINEAGE = "lineage.json"
_COLUMNS = ["prompt_ids", "response_ids", "correct"]


class ExpertSet(Sequence[Example]):
    """The examples of a written set, in KEY order of their trajectories: 4 bytes a token in memory."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError where the set is damaged."""
        if not (folder / NAME).exists():  # a set without experts has one, too
            raise UserError(f"the expert set {folder} is damaged: {NAME} is missing: restore the files from a copy.")
        shards = read_manifest(folder)
        for shard in shards:
            if wrong := size_damage(folder, shard):
                raise UserError(
                    f"the expert set {folder} is damaged: {shard.name} {wrong}: restore the files from a copy."
                )
        tables = [ShardFile(folder, shard).read(_COLUMNS) for shard in shards]
        self._table = with_large_lists(pa.concat_tables(tables)).combine_chunks() if tables else None

    def __len__(self) -> int:
        return 0 if self._table is None else len(self._table)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if self._table is None or not -len(self) <= index < len(self):
            raise IndexError(index)
        row = self._table.slice(index % len(self), 1)
        prompt, response = (tuple(row[name][0].values.to_numpy().tolist()) for name in ("prompt_ids", "response_ids"))
        return Example(prompt, response, float(row["correct"][0].as_py()))


def write_experts(cache: Path, shards: Sequence[Shard], query: ExpertQuery, folder: Path) -> dict[str, int]:
    """Select, and write the rows as shards with a manifest of their own and LINEAGE, atomically; `folder` is replaced.

    LINEAGE names the query and the shards that were asked, with their checksums. Returns how many `experts` there are,
    and of how many `problems`.
    """
    asked = [shard for shard in shards if any(shard.holds(iteration) for iteration in query.iterations)]
    sources = [{"name": shard.name, "rows": shard.rows, "sha256": shard.sha256} for shard in asked]
    written: list[Shard] = []
    problems: set[str] = set()
    with new_directory(folder) as unfinished:
        for piece in selection.select_experts(cache, shards, query):
            written.append(write_shard(unfinished / f"shard-{len(written):06d}.parquet", encode_table(piece)))
            problems.update(piece["problem_id"].unique().to_pylist())
        counts = {"experts": sum(shard.rows for shard in written), "problems": len(problems)}
        lineage = {"query": asdict(query), **counts, "cache": sources}
        write_manifest(unfinished, written)
        (unfinished / LINEAGE).write_text(json.dumps(lineage, indent=1) + "\n", encoding="utf-8")
    return counts
