"""A worker of the reward pool: `python -m rloop_mcore.reward.worker PARENT_PID`, started by `child.Child`.

JSON lines over its pipes: settings in, {"ready": true} or {"error": sentence} out; then lists of items in and one line
[correct, reason, seconds, note, vote] an item out, as soon as it is graded, so that the pool knows which item hangs.
Imports no torch.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rloop_mcore.errors import UserError
from rloop_mcore.platform.process import die_with_parent
from rloop_mcore.reward.verifiers import Verifier, Vote, as_verdict, load_verifier, load_vote
from rloop_mcore.types import Problem


def main() -> None:
    """Serve until the pool closes the pipe."""
    die_with_parent(int(sys.argv[1]))
    # A signal to a Slurm step reaches every process of it; the pool decides when a worker ends, not the signal.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    requests, replies = _private_pipes()
    settings = json.loads(requests.readline())
    try:
        verifier, vote = load_verifier(settings["verifier"]), load_vote(settings["verifier"])
    except UserError as error:
        _reply(replies, {"error": str(error)})
        return
    _limit_memory(settings["memory_mib"])
    _reply(replies, {"ready": True})
    for line in requests:
        for item in json.loads(line):
            _reply(replies, grade(verifier, vote, item, settings["answer_format"], settings["cpu_s"]))


def grade(verifier: Verifier, vote: Vote | None, item: list[Any], answer_format: str, cpu_s: float) -> list[Any]:
    """[correct, reason, seconds, note, vote] of one item [*Problem's fields, response, truncated, asks for its vote].

    An item that asks for its vote is not graded.

    Past `cpu_s` seconds of CPU time the kernel ends this process by SIGPROF, whatever the code is doing: an exception
    could be caught by the verifier, or wait for ever inside a C function.
    """
    *fields, response, truncated, asks_vote = item
    arguments = Problem(*fields), response, truncated, answer_format
    correct, reason, note, choice = False, "wrong", "", ""
    start = time.perf_counter()
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
        if asks_vote:
            choice = vote(*arguments) if vote is not None else ""
        else:
            verdict = as_verdict(verifier(*arguments))
            correct, reason = verdict.correct, verdict.reason
    except BaseException as error:  # SystemExit too: one answer must not end the worker
        correct, reason, note = False, "crashed", f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return [correct, reason, time.perf_counter() - start, note, choice]


def _private_pipes() -> tuple[Any, int]:
    """(requests, replies): the pipes to the pool, out of reach of a verifier that prints or reads stdin."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return requests, replies


def _limit_memory(mib: int) -> None:
    """Let the address space grow by `mib` MiB from here: an allocation past that raises MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _reply(replies: int, message: Any) -> None:
    line = json.dumps(message).encode() + b"\n"
    while line:
        line = line[os.write(replies, line) :]


if __name__ == "__main__":
    main()
