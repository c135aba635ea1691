"""Durable files: what a reader finds under its final name is whole, whatever was killed meanwhile."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ABANDONED_S = 60.0


def fsync_path(path: Path) -> None:
    """Flush a file's or a directory's entries to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling to write as a file or fill as a directory; on success it becomes `path`.

    Everything is fsynced before the rename and the parent directory after it. A directory already at `path` is
    replaced. On an exception the temporary is removed and `path` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".tmp-{os.getpid()}-{path.name}"
    try:
        yield temporary
        if temporary.is_dir():
            for root, _, files in os.walk(temporary):
                for name in files:
                    fsync_path(Path(root) / name)
                fsync_path(Path(root))
            if path.exists():
                shutil.rmtree(path)
        else:
            fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


def remove_abandoned(path: Path) -> None:
    """Remove what a killed process left of an unfinished `path`: nothing has changed in it for a minute."""
    for temporary in path.parent.glob(f".tmp-*-{path.name}"):
        found = [temporary, *temporary.rglob("*")]
        if max(entry.stat().st_mtime for entry in found) < time.time() - _ABANDONED_S:
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def write_atomic(path: Path, text: str) -> None:
    """Write a text file atomically and durably."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
