"""Child processes that cannot outlive their parent, that start fast, and that say where they are when they hang."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import resource
import signal
import sys
import threading
import traceback
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
    """Write the stacks of all threads to a file in memory whenever asked (Linux).

    Others read it as /proc/PID/fd/N, where N is a link to `memfd:rloop-stacks-M`, and ask by a byte to /proc/PID/fd/M.
    A thread answers, which waits for the interpreter's lock. Where something hangs with that lock, STACKS_SIGNAL asks
    without: no thread runs then, where one did the walk over its frames would end the process three times in ten. A
    process without such a file must not be sent the signal, which would end it.
    """
    if sys.platform == "linux":
        asked, ask = os.pipe()
        file = os.memfd_create(f"{STACKS}-{ask}")
        faulthandler.register(STACKS_SIGNAL, file=file, all_threads=True)
        threading.Thread(target=_show_stacks, args=(asked, file), name=STACKS, daemon=True).start()


def _show_stacks(asked: int, file: int) -> None:
    while os.read(asked, 1):
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        stacks = []
        for ident, frame in sys._current_frames().items():
            lines = [f"Thread {names.get(ident, ident)} (most recent call first):"]
            for each, line in traceback.walk_stack(frame):
                lines.append(f'  File "{each.f_code.co_filename}", line {line} in {each.f_code.co_name}')
            stacks.append("\n".join(lines))
        os.write(file, ("\n\n".join(stacks) + "\n").encode(errors="replace"))
