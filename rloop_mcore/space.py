"""A full disk is waited out: what has to be written is tried again until there is space."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rloop_mcore.errors import DiskFull
from rloop_mcore.platform.files import is_disk_full

_POLL_S = 5.0
_RESERVE = 16 * 2**20  # bytes that a large write leaves to the small ones

T = TypeVar("T")


@dataclass
class Space:
    """The space of the disk that `directory` is on. `tell` says to people what is waited for."""

    directory: Path
    tell: Callable[[str], None]
    stop_requested: Callable[[], bool]
    patience_s: float

    def write(self, what: str, action: Callable[[], T], needed: int = 0) -> T:
        """The result of `action`, begun when `needed` bytes are free, and anew where it fails for lack of space.

        So `action` must leave nothing half done that it can't do again. Raises DiskFull after `patience_s` seconds in
        vain, or when the run is asked to stop meanwhile.
        """
        deadline, told = time.monotonic() + self.patience_s, False
        while True:
            if not needed or self._free() >= needed + _RESERVE:
                try:
                    return action()
                except (OSError, DiskFull) as error:
                    if not (isinstance(error, DiskFull) or is_disk_full(error)):
                        raise
            want = f"{(needed + _RESERVE) / 2**20:.0f} MiB for {what}" if needed else what
            state = f"the disk of {self.directory} is full ({self._free() / 2**20:.1f} MiB are free)"
            if self.stop_requested() or time.monotonic() > deadline:
                raise DiskFull(f"{state}: no space for {want}. The same command goes on from the last commit.")
            if not told:
                self.tell(f"{state}: waiting for {want}, up to {self.patience_s / 3600:.1f} hours")
                told = True
            time.sleep(_POLL_S)

    def _free(self) -> int:
        return shutil.disk_usage(self.directory).free


def bytes_of(folder: Path) -> int:
    """What the files of a folder take."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
