"""Which shards a cache consists of: `manifest.json`, replaced atomically. A file it doesn't name doesn't exist."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from rloop_mcore.errors import UserError
from rloop_mcore.platform.files import write_atomic

NAME = "manifest.json"


@dataclass(frozen=True, slots=True)
class Shard:
    """One sealed Parquet file; `first` and `last` are the (iteration, step) of its first and last row."""

    name: str
    rows: int
    bytes: int
    sha256: str
    first: tuple[int, int]
    last: tuple[int, int]

    def holds(self, iteration: int) -> bool:
        """Whether the shard may have rows of the iteration."""
        return self.first[0] <= iteration <= self.last[0]


def write_manifest(directory: Path, shards: Sequence[Shard]) -> None:
    """Make `shards`, oldest first, the cache's content, durably."""
    entries = [asdict(shard) for shard in shards]
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    write_atomic(directory / NAME, f'{{"check": "{_check(entries)}", "shards": [\n{lines}\n]}}\n')


def read_manifest(directory: Path) -> list[Shard]:
    """The shards, oldest first; none where there is no manifest. Raises UserError when the manifest is damaged."""
    path = directory / NAME
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_bytes())
        entries = content["shards"]
        intact = content["check"] == _check(entries)
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise UserError(f"{path} is damaged (not JSON, or its checksum is wrong): restore it from a copy.")
    return [Shard(**{**entry, "first": tuple(entry["first"]), "last": tuple(entry["last"])}) for entry in entries]


def _check(entries: list[dict]) -> str:
    return sha256(json.dumps(entries).encode()).hexdigest()
