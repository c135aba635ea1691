"""Child processes that cannot outlive their parent, that start fast, and that say where they are when they hang."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_PR_SET_PDEATHSIG = 1
OWN_PATH = {"PYTHONSAFEPATH": "1"}  # environment of `python -m`: a json.py of the working directory is not Python's
STACKS = "rloop-stacks"  # the name of the file in memory that a process writes its stacks to
# SIGUSR1 and SIGUSR2 are Slurm's, SIGQUIT is SGLang's, and this one nobody's
STACKS_SIGNAL = signal.SIGRTMIN + 1 if sys.platform == "linux" else signal.SIGQUIT


def die_with_parent(parent: int) -> None:
    """Ask the kernel to SIGKILL this process when its parent thread dies (Linux).

    `parent` is the pid the caller believes to be its parent: if it died before this call took effect, exit now.
    Called first thing in a child, or as `preexec_fn=lambda: die_with_parent(pid)` of `subprocess.Popen`.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


@contextmanager
def handling(numbers: Iterable[int], handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Have signals of these numbers handled so during the block. Call it on the main thread."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def allow_many_files() -> None:
    """Raise this process's limit of open files, sockets among them, as far as it may."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextmanager
def importing() -> Iterator[None]:
    """While large packages are imported. What they make is no garbage: it is not looked for in it, now or later."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def show_stacks_when_asked() -> None:
    """At STACKS_SIGNAL write the stacks of all threads, whatever they wait for, to a file in memory (Linux).

    Others read it as /proc/PID/fd/N, where N is a link to `memfd:rloop-stacks`; a process without one must not be sent
    the signal, which would end it.
    """
    if sys.platform == "linux":
        faulthandler.register(STACKS_SIGNAL, file=os.memfd_create(STACKS), all_threads=True)
