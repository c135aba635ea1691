"""Where the processes of a hanging run are: their stacks, collected from outside."""

from __future__ import annotations

import os
import select
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

_ANSWER_S = 15.0  # for the processes to write their stacks, all at once
_BY_SIGNAL_S = 4.0  # of these the thread that is there for it has, then a signal asks: what hangs may keep it waiting
_QUIET_S = 0.3  # and then they are done
_PY_SPY_S = 20.0
# by what stands in the command of a process; ranks have their number
_ROLES = {"rollout.embedded": "engine", "sglang": "engine", "rloop_mcore.reward": "reward"}


def collect(processes: Sequence[psutil.Process], folder: Path) -> list[str]:
    """Write a file a process into `folder`; returns the files' names.

    Ranks and embedded engines write their stacks themselves; other Python processes (SGLang's, and the reward
    workers) are asked about by py-spy, where it is installed, and left out elsewhere. A stopped process goes on by it.
    Of a rank or engine that does not answer the file has what the kernel knows: a driver may hold it.
    Raises OSError where a file can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    states: dict[str, str] = {}  # by the file's name, as the others
    asked: dict[str, _Asked] = {}
    others: dict[str, psutil.Process] = {}
    for process in processes:
        with suppress(psutil.Error, OSError):  # it ended meanwhile
            name = f"{_role(process)}.txt"
            states[name], file = _state(process), _stacks_file(process.pid)
            if file is None:
                others[name] = process
            else:
                asked[name] = _Asked(process.pid, file)
    begun = time.monotonic()
    _wait(list(asked.values()), begun + _BY_SIGNAL_S)
    for each in asked.values():
        if not each.answered():
            each.send(STACKS_SIGNAL)
    _wait(list(asked.values()), begun + _ANSWER_S)
    stacks = {name: each.answer() for name, each in asked.items()}
    for name, process in others.items():
        with suppress(psutil.Error):
            stacks[name] = _by_py_spy(process)
    names = sorted(name for name, words in stacks.items() if words)
    for name in names:
        (folder / name).write_text(f"{states[name]}\n{stacks[name]}")
    return names


class _Asked:
    """A process that has been asked for its stacks. What it writes can be read when it has ended, too."""

    def __init__(self, pid: int, file: Path) -> None:
        self._file = os.open(file, os.O_RDONLY)
        self._before = self.size()
        self._process = os.pidfd_open(pid)
        ask = os.readlink(file).removeprefix(f"/memfd:{STACKS}-").split()[0]
        with open(f"/proc/{pid}/fd/{ask}", "wb", buffering=0) as pipe:
            pipe.write(b"?")
        self.send(signal.SIGCONT)

    def send(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it has ended
            signal.pidfd_send_signal(self._process, number)

    def size(self) -> int:
        return os.fstat(self._file).st_size

    def answered(self) -> bool:
        """Whether something is there that doesn't end within a line, where a busy machine may have it pause."""
        size = self.size()
        ended = bool(select.select([self._process], [], [], 0)[0])
        return size > self._before and (ended or os.pread(self._file, 1, size - 1) == b"\n")

    def answer(self) -> str:
        words = os.pread(self._file, self.size() - self._before, self._before).decode(errors="replace")
        os.close(self._file)
        os.close(self._process)
        return words or f"no answer within {_ANSWER_S:g} s\n"


def _wait(asked: Sequence[_Asked], deadline: float) -> None:
    """Until all have answered and are silent again."""
    sizes, changed = [process.size() for process in asked], time.monotonic()
    while time.monotonic() < deadline:
        if all(process.answered() for process in asked) and time.monotonic() - changed >= _QUIET_S:
            return
        time.sleep(0.05)
        if (now := [process.size() for process in asked]) != sizes:
            sizes, changed = now, time.monotonic()


def _role(process: psutil.Process) -> str:
    words = " ".join(process.cmdline())
    if "rloop_mcore.main.worker" in words and "RANK" in process.environ():
        return f"rank-{process.environ()['RANK']}"
    role = next((role for sign, role in _ROLES.items() if sign in words), "other")
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


def _stacks_file(pid: int) -> Path | None:
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
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
