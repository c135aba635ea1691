"""The pool's end of one worker."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from typing import Any

from rloop_mcore.platform.process import OWN_PATH

_SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)  # verifiers run on what a model wrote


class Child:
    """A worker (see `worker.py`), its two pipes, and the items it has in flight. Nothing here blocks but `end`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        # A new interpreter, not a fork: the trainer has threads. It finds the modules that this process finds.
        public = {name: value for name, value in os.environ.items() if not _SECRET.search(name)}
        environment = {
            **public,
            **OWN_PATH,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rloop_mcore.reward.worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            bufsize=0,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.stdin, False)
        os.set_blocking(self.stdout, False)
        self.grader = 0  # pid of the process that grades; 0: none yet
        self.ended = False  # it closed its end: dead, or dying
        self.overran = False  # its grader was killed at the deadline, and it has not said so yet
        self.jobs: deque[Any] = deque()  # the items in flight; it is at work on the first
        self.taken = False  # its grader has read them: the next one will not find them in the pipe
        self.out_of_step = False  # a grader left items in the pipe, or a part of them, to the next
        self.sign_of_life = time.monotonic()  # when it last got work or answered
        self._unsent = b""
        self._unread = b""
        self.send(settings)

    @property
    def sending(self) -> bool:
        """Is there something that the pipe has not taken yet?"""
        return bool(self._unsent)

    def send(self, message: Any) -> None:
        """Queue one message and write what the pipe takes."""
        self._unsent += json.dumps(message, default=str).encode() + b"\n"
        self.sign_of_life = time.monotonic()
        self.flush()

    def flush(self) -> None:
        """Write what the pipe takes of the queued messages."""
        try:
            while self._unsent:
                self._unsent = self._unsent[os.write(self.stdin, self._unsent) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._unsent = b""  # it died; `receive` sees that, after its last messages

    def receive(self) -> list[Any]:
        """The messages that have come; sets `ended` at the end of the stream."""
        try:
            while part := os.read(self.stdout, 1 << 16):
                self._unread += part
            self.ended = True
        except BlockingIOError:
            pass
        *lines, self._unread = self._unread.split(b"\n")
        if lines:
            self.sign_of_life = time.monotonic()
        return [json.loads(line) for line in lines]

    def kill_grader(self) -> None:
        """End the process that grades; the worker says so when it has the next."""
        self.overran = True
        self.sign_of_life = time.monotonic()
        with suppress(ProcessLookupError):
            os.kill(self.grader, signal.SIGKILL)

    def end(self) -> int:
        """Kill the process if it lives, reap it, close the pipes. Returns its exit code, -N for signal N.

        A process that closed its pipe is dying by itself: it has a second to do so, so that the code is its own.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if self.ended:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=1)
        self.process.kill()
        code = self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        return code
