"""The pool of worker processes that grades, and survives whatever an answer does to a verifier."""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rloop_mcore.config import RewardConfig
from rloop_mcore.errors import Fault, UserError
from rloop_mcore.platform.heartbeat import beat
from rloop_mcore.reward.canaries import ANSWER_LINE, BOXED, CANARIES
from rloop_mcore.reward.child import Child
from rloop_mcore.types import Problem, Verdict

logger = logging.getLogger(__name__)

Item = tuple[Problem, str, bool]  # (problem, response text, truncated)

START_TIMEOUT_S = 120.0
WALL_PER_CPU_SECOND = 20.0  # with CPU-time deadlines: how much slower than its CPU time an answer may be
LARGEST_CHUNK = 64  # items sent to a worker at a time: one line each way an item would cost more than a cheap verdict
FEWEST_TO_JUDGE = 8  # answers of a call below which their share of failures says nothing


class TooManyFailures(Fault):
    """So many answers of a call timed out or crashed that their rewards would teach nothing true."""


class RewardPool:
    """`protocols.Rewards` over worker processes; use it as a context manager.

    An answer that hangs or kills its worker gets the verdict timeout or crashed; the worker is replaced and the other
    answers are graded. With `deterministic` the deadline of an answer is CPU time (and a generous wall time behind it),
    so that a busy machine changes no verdict; without, it is wall time. Use it from one long-lived thread: the kernel
    ends a worker with the thread that started it.
    """

    def __init__(self, config: RewardConfig, deterministic: bool = True) -> None:
        self.counts: Counter[str] = Counter()  # verdicts so far, by reason
        self.replaced = 0  # workers lost and replaced
        self._config = config
        self._wall_s = config.deadline_s * (WALL_PER_CPU_SECOND if deterministic else 1.0)
        self._settings = {
            "verifier": config.verifier,
            "answer_format": config.answer_format,
            "cpu_s": config.deadline_s,
            "memory_mib": config.memory_mib,
        }
        self._lock = threading.Lock()
        self._children: list[Child] = []
        self._first_note = ""

    def __enter__(self) -> RewardPool:
        """Start the workers and grade the canaries. Raises UserError for a verifier that cannot be loaded."""
        try:
            for _ in range(self._config.workers or min(len(os.sched_getaffinity(0)), 16)):
                self._children.append(Child(self._settings))
            while not all(child.ready for child in self._children):
                self._exchange(deque())
            if self._config.verifier == "math":
                self._check_canaries()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; none is left, not even as a zombie."""
        while self._children:
            self._children.pop().end()

    def grade(self, items: Sequence[Item]) -> list[Verdict]:
        """One verdict an item, in order, whatever worker graded it when.

        Raises TooManyFailures when more than `reward.max_failure_share` of the items time out or crash.
        """
        with self._lock:
            if not self._children:
                raise RuntimeError("the reward pool is closed: use it inside `with RewardPool(...)`")
            try:
                verdicts = self._grade(items)
            except BaseException:
                self.close()  # a worker may still have items of this call
                raise
        self.counts.update(verdict.reason for verdict in verdicts)
        return verdicts

    def _grade(self, items: Sequence[Item]) -> list[Verdict]:
        verdicts: list[Verdict | None] = [None] * len(items)
        pending = deque(range(len(items)))
        failures, allowed = 0, max(self._config.max_failure_share * max(len(items), FEWEST_TO_JUDGE), 1)
        left = len(items)
        while left:
            for child in self._children:
                if pending and child.ready and not child.jobs and child.process.poll() is None:
                    self._assign(child, pending, items)
            for index, verdict in self._exchange(pending):
                beat()
                verdicts[index] = verdict
                left -= 1
                failures += verdict.reason in ("timeout", "crashed")
                if failures > allowed:
                    raise TooManyFailures(
                        f"{failures} of {len(items)} answers timed out or crashed in the verifier "
                        f"{self._config.verifier!r}, more than reward.max_failure_share="
                        f"{self._config.max_failure_share:g} allows (reward.deadline_s={self._config.deadline_s:g}, "
                        f"reward.memory_mib={self._config.memory_mib}); the first: {self._first_note}"
                    )
        return [verdict for verdict in verdicts if verdict is not None]

    def _assign(self, child: Child, pending: deque[int], items: Sequence[Item]) -> None:
        """Give an idle worker the next items: large chunks first, single ones at the end, so that all end together."""
        size = max(1, min(LARGEST_CHUNK, len(pending) // (2 * len(self._children))))
        child.jobs.extend(pending.popleft() for _ in range(min(size, len(pending))))
        child.send([_message(items[index]) for index in child.jobs])

    def _exchange(self, pending: deque[int]) -> list[tuple[int, Verdict]]:
        """Wait for the workers, at most to the next deadline; returns (index, verdict) of what got one.

        Replaces the workers that died or passed a deadline; their other items go back to `pending`.
        """
        poller = select.poll()
        for child in self._children:
            poller.register(child.stdout, select.POLLIN)
            if child.sending:
                poller.register(child.stdin, select.POLLOUT)
        deadlines = [child.sign_of_life + limit for child in self._children if (limit := self._limit(child))]
        wait_s = min(deadlines, default=time.monotonic() + 1.0) - time.monotonic()
        ready = {fd for fd, _ in poller.poll(max(0.0, wait_s) * 1000 + 1)}
        now = time.monotonic()
        graded: list[tuple[int, Verdict]] = []
        for position, child in enumerate(self._children):
            if child.stdin in ready:
                child.flush()
            if child.stdout in ready:
                graded += self._receive(child)
            limit = self._limit(child)
            if child.ended or (limit and now - child.sign_of_life > limit):
                graded += self._bury(child, now, pending)
                self._children[position] = Child(self._settings)
                self.replaced += 1
        return graded

    def _limit(self, child: Child) -> float | None:
        """Seconds that a worker may be silent; None for an idle one."""
        if not child.ready:
            return START_TIMEOUT_S
        return self._wall_s if child.jobs else None

    def _receive(self, child: Child) -> list[tuple[int, Verdict]]:
        graded = []
        for message in child.receive():
            if child.ready:
                correct, reason, seconds, note = message
                self._take_note(note)
                graded.append((child.jobs.popleft(), Verdict(correct, reason, seconds)))
            elif "error" in message:
                raise UserError(message["error"])
            else:
                child.ready = True
        return graded

    def _bury(self, child: Child, now: float, pending: deque[int]) -> list[tuple[int, Verdict]]:
        """End a worker that died or overran: the verdict of the item it was at; the rest goes back to the front."""
        hung = not child.ended
        code = child.end()
        if not child.ready:
            cause = f"not within {START_TIMEOUT_S:g} s" if hung else f"it ended with code {code}"
            raise RuntimeError(f"a reward worker for the verifier {self._config.verifier!r} did not start: {cause}")
        if not child.jobs:
            return []
        seconds = now - child.sign_of_life
        index = child.jobs.popleft()
        pending.extendleft(reversed(child.jobs))
        if hung or code == -signal.SIGPROF:
            self._take_note(f"no verdict within reward.deadline_s={self._config.deadline_s:g}")
            return [(index, Verdict(False, "timeout", seconds))]
        self._take_note(f"the worker ended with code {code}")
        return [(index, Verdict(False, "crashed", seconds))]

    def _take_note(self, note: str) -> None:
        if note and not self._first_note:
            self._first_note = note
            logger.warning("first answer that the verifier %r failed on: %s", self._config.verifier, note)

    def _check_canaries(self) -> None:
        """Grade pairs with known verdicts; UserError if one comes out wrong."""
        form = BOXED if self._config.answer_format == "boxed" else ANSWER_LINE
        items = [(Problem("canary", "", gold), form.format(answer), False) for gold, answer, _ in CANARIES]
        for (gold, answer, right), verdict in zip(CANARIES, self._grade(items), strict=True):
            if verdict.correct != right:
                raise UserError(
                    f"the math verifier is broken here: it calls the answer {answer!r} to the gold answer {gold!r} "
                    f"{verdict.reason}, not {'correct' if right else 'wrong'}; check the installed versions of "
                    "math-verify, latex2sympy2_extended, sympy and antlr4-python3-runtime"
                )


def _message(item: Item) -> list[Any]:
    problem, response, truncated = item
    return [problem.id, problem.problem, problem.answer, problem.source, problem.meta, response, truncated]
