"""A full disk is waited out: what has to be written is tried again until there is space."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rloop_mcore.errors import DiskFull, Interrupted
from rloop_mcore.platform.files import is_disk_full
from rloop_mcore.platform.heartbeat import beat

log = logging.getLogger(__name__)

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
        vain, and Interrupted when the run is asked to stop meanwhile.
        """
        deadline, told = time.monotonic() + self.patience_s, False
        while True:
            lack = f"{(needed + _RESERVE) / 2**20:.0f} MiB are needed"
            if not needed or self._free() >= needed + _RESERVE:
                try:
                    return action()
                except (OSError, DiskFull) as error:
                    if not (isinstance(error, DiskFull) or is_disk_full(error)):
                        raise
                    lack = str(error)
            free = f"{self._free() / 2**20:.1f} MiB are free"
            state = f"no space for {what} in {self.directory} ({lack}; {free})"
            if self.stop_requested():
                raise Interrupted(f"{state}, and it was asked to stop")
            if time.monotonic() > deadline:
                raise DiskFull(f"{state}. The same command goes on from the last commit.")
            if not told:
                text = f"{state}: waiting for it, up to {self.patience_s / 3600:.1f} hours"
                log.warning(text)
                self.tell(text)
                told = True
            beat()  # a wait with a deadline of its own, of which people were told
            time.sleep(_POLL_S)

    def _free(self) -> int:
        return shutil.disk_usage(self.directory).free


def bytes_of(files: Iterable[Path]) -> int:
    """What they take."""
    return sum(path.stat().st_size for path in files)
