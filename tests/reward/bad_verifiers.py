"""Verifiers that do to a worker what answers do to verifiers; the response says what."""

import os
import signal
import sys
import time
from pathlib import Path

from rloop_mcore.types import Problem


def misbehave(problem: Problem, response: str, truncated: bool, answer_format: str) -> tuple[bool, str]:
    """Right if the response is the gold answer, unless it asks for trouble."""
    if response == "loop":
        while True:
            pass
    if response == "loop and catch":
        while True:
            try:
                while True:
                    pass
            except BaseException:
                continue
    if response == "loop in C":
        pow(7, 10**9)
    if response == "wait":
        os.read(os.pipe()[0], 1)
    if response == "nap":
        time.sleep(1)
    if response == "exit":
        os._exit(3)
    if response == "sys.exit":
        sys.exit(3)
    if response == "abort":
        os.abort()
    if response == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if response == "wait, the first time":
        if not Path(problem.answer).exists():
            Path(problem.answer).write_text(str(os.getpid()))
            os.read(os.pipe()[0], 1)
        return True, "correct"
    if response == "memory":
        bytearray(2**33)
    if response == "raise":
        raise ValueError("no verdict")
    if response == "nonsense":
        return "yes"  # type: ignore[return-value]
    if response == "print":
        print("[true, 'correct']")
        sys.stdin.read()
    if response == "touch":
        Path(problem.answer).touch()
        return True, "correct"
    if response == "torch":
        return "torch" in sys.modules, "wrong"
    if response == "pid":
        return True, "correct" if os.getpid() in problem.meta["graders"] else "wrong"
    correct = response == problem.answer
    return correct, "correct" if correct else "wrong"


NOT_A_FUNCTION = 3
