"""Child processes that cannot outlive their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Ask the kernel to SIGKILL this process when its parent thread dies (Linux).

    `parent` is the pid the caller believes to be its parent: if it died before this call took effect, exit now.
    Called first thing in a child, or as `preexec_fn=lambda: die_with_parent(pid)` of `subprocess.Popen`.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
