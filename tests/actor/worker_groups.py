"""Prints how many threads this process has beside its first ones: in a layout and out of it, three times, and after."""

from __future__ import annotations

import os

from rloop_mcore import platform

platform.setup("cpu", threads=1)

from rloop_mcore.actor import parallel  # noqa: E402
from rloop_mcore.config import LayoutConfig  # noqa: E402
from tests.layouts import leave_layout  # noqa: E402


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


before, counts = threads(), []
for _ in range(3):
    parallel.initialize(LayoutConfig(), seed=0, timeout_s=60.0)
    counts.append(threads() - before)
    leave_layout()
    counts.append(threads() - before)
parallel.destroy()
print(*counts, threads() - before)
