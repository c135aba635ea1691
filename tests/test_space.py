"""Waiting for a full disk."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rloop_mcore import space
from rloop_mcore.errors import DiskFull, Interrupted
from rloop_mcore.space import Space, bytes_of


class Clock:
    """Time passes by sleeping only; the disk has `free[n]` bytes after the n-th sleep."""

    def __init__(self, free: list[int]) -> None:
        self.now, self.free = 0.0, free

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if len(self.free) > 1:
            self.free.pop(0)


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., tuple[Space, list[str]]]:
    def build(free: list[int], stop: Callable[[], bool] = lambda: False) -> tuple[Space, list[str]]:
        clock, said = Clock(free), list[str]()
        usage = type("Usage", (), {"free": property(lambda _: clock.free[0])})
        monkeypatch.setattr(space.shutil, "disk_usage", lambda path: usage())
        monkeypatch.setattr(space.time, "sleep", clock.sleep)
        monkeypatch.setattr(space.time, "monotonic", lambda: clock.now)
        return Space(tmp_path, said.append, stop, patience_s=60.0), said

    return build


def failing(errors: list[Exception]) -> Callable[[], str]:
    left: Iterator[Exception] = iter(errors)

    def action() -> str:
        for error in left:
            raise error
        return "written"

    return action


FULL = [OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EDQUOT, "Quota exceeded"), DiskFull("full")]


def test_what_fails_for_lack_of_space_is_done_again(on_disk: Any) -> None:
    disk, said = on_disk([0])
    assert disk.write("the journal", failing(FULL)) == "written"
    assert len(said) == 1
    assert "no space for the journal in" in said[0]
    assert "([Errno 28] No space left on device; 0.0 MiB are free): waiting for it, up to 0.0 hours" in said[0]


def test_a_large_write_is_not_begun_before_it_fits(on_disk: Any) -> None:
    disk, said = on_disk([0, 3 * 10**6, 10**8])  # the second would leave too little to small writes
    begun: list[float] = []
    disk.write("checkpoints/x", lambda: begun.append(space.time.monotonic()), needed=2 * 10**6)
    assert begun == [2 * space._POLL_S]
    assert "no space for checkpoints/x in" in said[0]
    assert "(18 MiB are needed; 0.0 MiB are free): waiting for it" in said[0]


def test_another_failure_is_none_of_its_business(on_disk: Any) -> None:
    disk, said = on_disk([0])
    with pytest.raises(PermissionError):
        disk.write("the journal", failing([PermissionError(errno.EACCES, "denied")]))
    assert said == []


def test_it_gives_up_in_time_and_when_asked_to_stop(on_disk: Any) -> None:
    disk, _ = on_disk([0])
    with pytest.raises(DiskFull, match=r"no space for the journal in .* The same command goes on from the last commit"):
        disk.write("the journal", failing(FULL * 100))
    assert 60.0 < space.time.monotonic() <= 60.0 + 2 * space._POLL_S
    disk, _ = on_disk([0], stop=lambda: True)
    with pytest.raises(Interrupted, match=r"no space for the journal in .*, and it was asked to stop"):
        disk.write("the journal", failing(FULL))
    assert space.time.monotonic() == 0.0


def test_bytes_of_files(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"123")
    (tmp_path / "y").write_bytes(b"45")
    assert bytes_of(tmp_path.iterdir()) == 5
