"""Where the processes of a hanging run are: their stacks, collected from outside."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from rloop_mcore.platform.process import STACKS, STACKS_SIGNAL

_ANSWER_S = 5.0  # for a process to write its stacks
_QUIET_S = 0.3  # and then it is done
_PY_SPY_S = 20.0


def collect(processes: Sequence[psutil.Process], folder: Path) -> list[str]:
    """Write a file a process into `folder`; returns the files' names.

    Ranks and embedded engines write their stacks themselves; other Python processes (SGLang's, and the reward
    workers) are asked about by py-spy, where it is installed, and left out elsewhere. A stopped process goes on by it.
    Raises OSError where a file can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for process in processes:
        with suppress(psutil.Error):  # it ended meanwhile
            state = _state(process)
            stacks = _own_words(process) or _by_py_spy(process)
            if stacks:
                names.append(f"{_role(process)}.txt")
                (folder / names[-1]).write_text(f"{state}\n{stacks}")
    return sorted(names)


def _role(process: psutil.Process) -> str:
    words = " ".join(process.cmdline())
    if "rloop_mcore.main.worker" in words and "RANK" in process.environ():
        return f"rank-{process.environ()['RANK']}"
    role = (
        "engine"
        if "rollout.embedded" in words or "sglang" in words
        else "reward"
        if "rloop_mcore.reward" in words
        else "other"
    )
    return f"{role}-{process.pid}"


def _state(process: psutil.Process) -> str:
    """What the kernel knows: how many of the threads of each name wait where in it (0: they run)."""
    threads: Counter[str] = Counter()
    with suppress(FileNotFoundError):  # the process has ended, which psutil says below
        for thread in Path(f"/proc/{process.pid}/task").iterdir():
            with suppress(OSError):
                name, where = ((thread / file).read_text().strip() for file in ("comm", "wchan"))
                threads[f"{name} in {where or 'user space'}"] += 1
    words = [f"pid {process.pid}, {process.status()}: {' '.join(process.cmdline())[:300]}"]
    return "\n".join(words + [f"{count} threads {place}" for place, count in sorted(threads.items())]) + "\n"


def _own_words(process: psutil.Process) -> str:
    """What the process writes when it is asked; "" where it can't be, or doesn't answer."""
    file = _stacks_file(process.pid)
    if file is None:
        return ""
    try:
        before = file.stat().st_size
        os.kill(process.pid, STACKS_SIGNAL)
        if process.status() == psutil.STATUS_STOPPED:
            os.kill(process.pid, signal.SIGCONT)
        deadline, size, changed = time.monotonic() + _ANSWER_S, before, time.monotonic()
        while time.monotonic() < deadline and (size == before or time.monotonic() - changed < _QUIET_S):
            time.sleep(0.05)
            if (now := file.stat().st_size) != size:
                size, changed = now, time.monotonic()
        return file.read_bytes()[before:].decode(errors="replace")
    except OSError:
        return ""


def _stacks_file(pid: int) -> Path | None:
    with suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            if os.readlink(link).startswith(f"/memfd:{STACKS}"):
                return link
    return None


def _by_py_spy(process: psutil.Process) -> str:
    program = shutil.which("py-spy")
    if program is None or "python" not in process.name():
        return ""
    command = [program, "dump", "--pid", str(process.pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PY_SPY_S)
    except subprocess.TimeoutExpired:
        return f"py-spy did not answer within {_PY_SPY_S:g} s"
    return done.stdout or f"py-spy: {done.stderr.strip()}"
