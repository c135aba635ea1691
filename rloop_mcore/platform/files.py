"""Durable files: what a reader finds under its final name is whole, whatever was killed meanwhile."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from rloop_mcore.errors import UserError

_QUIET_S = 60.0
_FLUSH_S = 0.05
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # Lustre without -o flock; NFS without its lock manager


def fsync_path(path: Path) -> None:
    """Flush a file's or a directory's entries to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def flushing(descriptors: Sequence[int]) -> Iterator[None]:
    """Have what the block writes to these files go to the disk meanwhile, so that fsync finds little left to do."""
    ended = threading.Event()

    def flush() -> None:
        while not ended.wait(_FLUSH_S):
            for descriptor in descriptors:
                os.fdatasync(descriptor)

    with ThreadPoolExecutor(1) as pool:
        flushed = pool.submit(flush)
        try:
            yield
        finally:
            ended.set()
        flushed.result()  # an error of the disk is told once: a later fsync may not have it


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an exception, or what it came of, says that there is no space left, or none within the quota."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def passing_over_a_full_disk() -> Iterator[None]:
    """Go on after the block where it fails for lack of space."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise


def try_lock(descriptor: int, shared: bool = False) -> bool:
    """Lock an open file until it is closed, for this process alone or `shared`; False where another process has it.

    On NFS it must be open for writing, unless `shared`. Raises UserError where the file system has no locks.
    """
    try:
        _lock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock(descriptor: int, operation: int) -> None:
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        raise UserError(
            f"{path} cannot be locked ({error.strerror}), which keeps two runs apart: choose a folder on another file "
            "system, or have this one mounted with locks (Lustre: -o flock)."
        ) from error


@contextmanager
def atomic_path(path: Path, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary sibling to write as a file or fill as a directory; on success it becomes `path`.

    Everything is fsynced before the rename and the parent directory after it. What is already at `path` is replaced;
    with `replace` off FileExistsError is raised instead. On an exception the temporary is removed and `path` is
    untouched.
    """
    if not path.parent.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        fsync_path(path.parent.parent)  # else a power cut may take it, and all that is in it
    # Another container's process may have the same number, and be writing still.
    names = (path.parent / f".tmp-{number}-{path.name}" for number in count(os.getpid()))
    temporary = next(name for name in names if not os.path.lexists(name))
    try:
        yield temporary
        if temporary.is_dir():
            for root, _, files in os.walk(temporary):
                for name in files:
                    fsync_path(Path(root) / name)
                fsync_path(Path(root))
        else:
            fsync_path(temporary)
        if not replace and os.path.lexists(path):
            raise FileExistsError(f"{path} was made by somebody else meanwhile")
        if temporary.is_dir() and path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
        fsync_path(path.parent)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def new_directory(path: Path, replace: bool = True) -> Iterator[Path]:
    """An empty directory that becomes `path`, as by `atomic_path`, when it is complete; see `remove_abandoned`."""
    with atomic_path(path, replace) as temporary:
        temporary.mkdir()
        lock = os.open(temporary, os.O_RDONLY)
        try:
            _lock(lock, fcntl.LOCK_EX)
            yield temporary
        finally:
            os.close(lock)


def remove_abandoned(path: Path) -> None:
    """Remove what a killed process left of an unfinished `path`: nobody locks it, and it was quiet for a minute."""
    for temporary in path.parent.iterdir() if path.parent.is_dir() else ():
        if re.fullmatch(rf"\.tmp-\d+-{re.escape(path.name)}", temporary.name) and temporary.is_dir():
            lock = os.open(temporary, os.O_RDONLY)
            try:
                if try_lock(lock) and _newest(temporary) < time.time() - _QUIET_S:
                    shutil.rmtree(temporary)
            finally:
                os.close(lock)


def _newest(folder: Path) -> float:
    """When something in the folder was last changed, in Unix seconds."""
    return max(entry.lstat().st_mtime for entry in (folder, *folder.rglob("*")))


def write_atomic(path: Path, text: str) -> None:
    """Write a text file atomically and durably."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def parse_json(text: str | bytes) -> Any:
    """The JSON value that `text` is. Raises ValueError where it is none, or is nested too deep to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def json_object(text: str | bytes) -> dict[str, Any]:
    """The JSON object that `text` is. Raises ValueError where it is something else."""
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError(f"it is {json.dumps(value):.40}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError where it is missing or something else."""
    try:
        return json_object(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON object ({error}).") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file to which lines are still added: one that is not ended is none yet. Empty without a file.

    Raises UserError that names a damaged line.
    """
    if not path.exists():
        return []
    *whole, _being_written = path.read_bytes().split(b"\n")
    objects = []
    for number, line in enumerate(whole, start=1):
        try:
            objects.append(json_object(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number} is no JSON object ({error}): the file is damaged.") from error
    return objects
