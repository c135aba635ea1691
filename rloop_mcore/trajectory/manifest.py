"""Which shards a cache consists of: `manifest.json`, replaced atomically. A file it doesn't name doesn't exist."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from rloop_mcore.errors import UserError
from rloop_mcore.platform.files import fsync_path, parse_json, write_atomic

NAME = "manifest.json"
QUARANTINE = "quarantine"
TIMES_FOLDER = "times"


@dataclass(frozen=True, slots=True)
class Shard:
    """One sealed Parquet file.

    `footer` is the sha256 of the file's end, which says where the columns are and, unlike these, has no checksum of
    its own. `steps` are the (iteration, step, rows) of its rows: here and not in the file alone, so that what is lost
    with a file can be told exactly. `sealed_as` are the names that the journal knows its rows by: its own, or those of
    the shards that were merged into it. `lost` says what was wrong when it was set aside; "" for a shard that is there.
    """

    name: str
    rows: int
    bytes: int
    sha256: str
    footer: str
    steps: tuple[tuple[int, int, int], ...]
    sealed_as: tuple[str, ...]
    lost: str = ""

    def holds(self, iteration: int) -> bool:
        """Whether the shard has rows of the iteration."""
        return any(iteration == mine for mine, _, _ in self.steps)


def write_manifest(directory: Path, shards: Sequence[Shard]) -> None:
    """Make `shards`, oldest first, the cache's content, durably."""
    entries = [asdict(shard) for shard in shards]
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    write_atomic(directory / NAME, f'{{"check": "{_check(entries)}", "shards": [\n{lines}\n]}}\n')


def read_manifest(directory: Path) -> list[Shard]:
    """The shards, oldest first, lost ones too; none where there is no manifest.

    Raises UserError when the manifest is damaged or another version of rloop wrote it.
    """
    path = directory / NAME
    if not path.exists():
        return []
    try:
        content = parse_json(path.read_bytes())
        entries = content["shards"]
        intact = content["check"] == _check(entries)
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise UserError(f"{path} is damaged (not JSON, or its checksum is wrong): restore it from a copy.")
    try:
        return [_shard(entry) for entry in entries]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is of another version of rloop: go on with that one, or start anew in another run.dir."
        ) from error


def discard_unnamed(directory: Path, shards: Sequence[Shard]) -> None:
    """Remove the files that the manifest, which lists `shards`, doesn't name; files of lost shards are set aside."""
    fsync_path(directory)  # a kill may have left a manifest that a power cut takes back: not once files are gone
    lost = {shard.name for shard in shards if shard.lost}
    named = {NAME, QUARANTINE, TIMES_FOLDER, *(shard.name for shard in shards)}
    for name in sorted(os.listdir(directory)):
        if name in lost:
            _set_aside(directory, name)
        elif name not in named and not (directory / name).is_dir():  # a folder is somebody else's
            (directory / name).unlink()
    fsync_path(directory)
    if (directory / TIMES_FOLDER).exists():
        sealed = {name for shard in shards for name in shard.sealed_as}
        for name in set(os.listdir(directory / TIMES_FOLDER)) - sealed:
            (directory / TIMES_FOLDER / name).unlink()


def _set_aside(directory: Path, name: str) -> None:
    (directory / QUARANTINE).mkdir(exist_ok=True)
    os.replace(directory / name, directory / QUARANTINE / name)
    fsync_path(directory / QUARANTINE)


def _shard(entry: dict[str, Any]) -> Shard:
    steps = tuple((iteration, step, rows) for iteration, step, rows in entry["steps"])
    return Shard(**{**entry, "steps": steps, "sealed_as": tuple(entry["sealed_as"])})


def _check(entries: list[dict]) -> str:
    return sha256(json.dumps(entries).encode()).hexdigest()
