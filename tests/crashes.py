"""Crashes between any two file operations: a process that dies at the n-th one, a power cut that takes what no fsync
kept.

    disk = Disk(folder)
    with disk.dying_at(7):
        work()          # ends silently where it asks for its seventh change of a file; every later change fails too
    disk.lose_power(Random(0))

The changes really happen, in `folder`; beside them the disk keeps what a power cut is sure to leave: the bytes of a
file as of its last fsync, the names in a directory as of the directory's. Nothing is really fsynced. After changes
outside `dying_at` there must be a `settle`. Only what Python's `os` and `open` do is seen; directories must not be
renamed.
"""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

_CHANGES = ("replace", "rename", "unlink", "mkdir", "rmdir", "ftruncate", "truncate", "link")


class Crash(BaseException):
    """The end of the process. No `except Exception` survives it."""


class _File:
    """A file, whatever its name: `durable` are its bytes as of the last fsync."""

    def __init__(self, durable: bytes = b"") -> None:
        self.durable = durable


class Disk:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.operations = 0  # changes asked for in the last `dying_at`
        self.dead = False
        self._last: int | None = None
        self.settle()

    @contextmanager
    def dying_at(self, operation: int | None) -> Iterator[None]:
        """The process dies before its `operation`-th change, counted from 1: a write, amid it. None: it lives."""
        self.operations, self.dead, self._last = 0, False, operation
        real_open, real_os_open, real_fsync = builtins.open, os.open, os.fsync

        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not set(mode) & set("wax+"):
                return real_open(file, mode, *args, **kwargs)
            if isinstance(file, int):
                return _Writer(self, real_open(file, mode, *args, **kwargs))
            self._change()
            return _Writer(self, self._created(file, lambda: real_open(file, mode, *args, **kwargs)))

        def os_opened(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return real_os_open(path, flags, *args, **kwargs)
            self._change()
            return self._created(path, lambda: real_os_open(path, flags, *args, **kwargs))

        def fsynced(descriptor: int) -> None:
            self._change()
            self._keep(Path(os.readlink(f"/proc/self/fd/{descriptor}")), real_fsync, descriptor)

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def change(*args: Any, **kwargs: Any) -> Any:
                self._change()
                return real(*args, **kwargs)

            return change

        with ExitStack() as patches:
            patches.enter_context(patch.object(builtins, "open", opened))
            patches.enter_context(patch.object(io, "open", opened))
            patches.enter_context(patch.object(os, "open", os_opened))
            patches.enter_context(patch.object(os, "fsync", fsynced))
            for name in _CHANGES:
                patches.enter_context(patch.object(os, name, counted(getattr(os, name))))
            with suppress(Crash):
                yield
        assert self.dead or operation is None or self.operations < operation

    def lose_power(self, draw: Random) -> None:
        """Leave in the folder something that a power cut now may leave: of what is not durable, this and not that."""
        now = {self._files[path.stat().st_ino]: path.read_bytes() for path in _files(self.folder)}
        left: dict[Path, bytes | None] = {}
        for directory in sorted({*self._names, *_directories(self.folder)}):
            if directory != self.folder and directory not in left:
                continue
            durable, visible = self._names.get(directory, {}), self._visible(directory)
            for name in sorted({*durable, *visible}):
                entry = draw.choice((durable, visible)).get(name)
                if isinstance(entry, _File):
                    left[directory / name] = _torn(entry.durable, now.get(entry, entry.durable), draw)
                elif entry is not None:
                    left[directory / name] = None
        for path in _files(self.folder):
            path.unlink()
        for directory in sorted(_directories(self.folder), reverse=True):
            directory.rmdir() if directory != self.folder else None
        for path, content in sorted(left.items()):
            path.mkdir() if content is None else path.write_bytes(content)
        self.settle()

    def settle(self) -> None:
        """Take everything that is there as durable."""
        self._files = {path.stat().st_ino: _File(path.read_bytes()) for path in _files(self.folder)}
        self._names = {directory: self._visible(directory) for directory in _directories(self.folder)}

    def _change(self, before_death: Callable[[], Any] = lambda: None) -> None:
        """Count a change; the last one ends the process, and a dead process changes nothing."""
        if self.dead:
            raise Crash
        self.operations += 1
        if self.operations == self._last:
            before_death()
            self.dead = True
            raise Crash

    def _created(self, path: Any, make: Callable[[], Any]) -> Any:
        is_new = not os.path.lexists(path)
        opened = make()
        if is_new:
            self._files[os.stat(path).st_ino] = _File()
        return opened

    def _keep(self, path: Path, real_fsync: Callable[[int], None], descriptor: int) -> None:
        if not path.is_relative_to(self.folder):
            real_fsync(descriptor)
        elif path.is_dir():
            self._names[path] = self._visible(path)
        else:
            self._files[path.stat().st_ino].durable = path.read_bytes()

    def _visible(self, directory: Path) -> dict[str, _File | str]:
        """The names in a directory: of files and of directories."""
        paths = sorted(directory.iterdir()) if directory.is_dir() else []
        return {path.name: "directory" if path.is_dir() else self._files[path.stat().st_ino] for path in paths}


class _Writer:
    """A file opened for writing: a write is seen at once, and half of it where the process dies."""

    def __init__(self, disk: Disk, file: Any) -> None:
        self._disk, self._file = disk, file

    def write(self, data: Any) -> int:
        def half() -> None:
            self._file.write(bytes(data)[: len(data) // 2] if not isinstance(data, str) else data[: len(data) // 2])
            self._file.flush()

        self._disk._change(half)
        written = self._file.write(data)
        self._file.flush()
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def _torn(durable: bytes, now: bytes, draw: Random) -> bytes:
    """What may be on disk of a file changed since its fsync: nothing, everything, a part, or its length alone."""
    kept = next((n for n, (a, b) in enumerate(zip(durable, now, strict=False)) if a != b), min(len(durable), len(now)))
    cut = draw.randint(kept, max(kept, len(now)))
    return draw.choice((durable, now, now[:cut], now[:cut] + b"\0" * (len(now) - cut)))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _directories(folder: Path) -> list[Path]:
    return [folder, *sorted(path for path in folder.rglob("*") if path.is_dir())]
