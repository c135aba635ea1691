"""A run's sign of life: a file that is touched whenever something gets done, whatever it is.

One a process, as logging is: whoever finishes a piece of work says `beat()`, and need not know who watches. Only rank 0
starts it; elsewhere `beat` does nothing.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

_EVERY_S = 1.0

_path: Path | None = None
_last = 0.0


def start(path: Path | None) -> None:
    """From now on `beat` touches `path`, which exists already. None: no more."""
    global _path, _last
    _path, _last = path, 0.0


def beat() -> None:
    """Something got done. At most once a second the file is touched; from any thread."""
    global _last
    now = time.monotonic()
    if _path is not None and now - _last >= _EVERY_S:
        _last = now
        with suppress(OSError):  # whoever watches will say that nothing comes
            os.utime(_path)
