"""A worker of the reward pool: `python -m rloop_mcore.reward.worker PARENT_PID`, started by `child.Child`.

It loads the verifier once, grades the canaries, and forks the grader: the process that meets what a model wrote.
When that one dies, of a deadline or of an answer, the next is forked in milliseconds, with the parser warm; a new
interpreter would take seconds for each hanging answer.

JSON lines over its pipes: settings in, {"ready": pid of the grader, "canaries": verdicts} or {"error": sentence} out;
then lists of items in and, for each list, a line {"taken": number of items} and one line [correct, reason, seconds,
note, vote] an item out, as soon as it is graded, so that the pool knows which item hangs. {"grader": pid, "died": code}
says that there is a new grader. Imports no torch.
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

_FINISHED, _RECYCLED = 64, 65  # exit codes of a grader: the pool closed the pipe; it has graded its share


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
    canaries = [list(_grade(verifier, vote, item, settings["answer_format"])) for item in settings["canaries"]]
    first, code = True, 0
    while code != _FINISHED:
        pid = os.fork()
        if not pid:
            die_with_parent(os.getppid())
            _serve(verifier, vote, settings, requests, replies)
        if first:
            _reply(replies, {"ready": pid, "canaries": canaries})
        else:
            _reply(replies, {"grader": pid, "died": None if code == _RECYCLED else code})
        first, code = False, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _serve(verifier: Verifier, vote: Vote | None, settings: dict[str, Any], requests: Any, replies: int) -> None:
    """The grader: grade until the pipe closes or `recycle` answers are done; does not return."""
    _limit_memory(settings["memory_mib"])
    done = 0
    while line := requests.readline():
        items = json.loads(line)
        _reply(replies, {"taken": len(items)})
        for item in items:
            _reply(replies, timed(verifier, vote, item, settings["answer_format"], settings["cpu_s"]))
        done += len(items)
        if done >= settings["recycle"]:
            os._exit(_RECYCLED)
    os._exit(_FINISHED)


def timed(verifier: Verifier, vote: Vote | None, item: list[Any], answer_format: str, cpu_s: float) -> list[Any]:
    """[correct, reason, seconds, note, vote] of one item [*Problem's fields, response, truncated, asks for its vote].

    An item that asks for its vote is not graded.

    Past `cpu_s` seconds of CPU time the kernel ends this process by SIGPROF, whatever the code is doing: an exception
    could be caught by the verifier, or wait for ever inside a C function.
    """
    start = time.perf_counter()
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    correct, reason, note, choice = _grade(verifier, vote, item, answer_format)
    signal.setitimer(signal.ITIMER_PROF, 0)
    return [correct, reason, time.perf_counter() - start, note, choice]


def _grade(verifier: Verifier, vote: Vote | None, item: list[Any], answer_format: str) -> tuple[bool, str, str, str]:
    *fields, response, truncated, asks_vote = item
    arguments = Problem(*fields), response, truncated, answer_format
    try:
        if asks_vote:
            return False, "wrong", "", vote(*arguments) if vote is not None else ""
        verdict = as_verdict(verifier(*arguments))
    except BaseException as error:  # SystemExit too: one answer must not end the worker
        return False, "crashed", f"{type(error).__name__}: {error}"[:300], ""
    return verdict.correct, verdict.reason, "", ""


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
