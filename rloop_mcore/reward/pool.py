"""The pool of worker processes that grades, and survives whatever an answer does to a verifier."""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rloop_mcore.config import RewardConfig
from rloop_mcore.errors import Fault, UserError
from rloop_mcore.platform.heartbeat import beat
from rloop_mcore.reward.canaries import canary_items, check_canaries
from rloop_mcore.reward.child import Child
from rloop_mcore.types import Problem, Verdict

logger = logging.getLogger(__name__)

Item = tuple[Problem, str, bool]  # (problem, response text, truncated)

START_TIMEOUT_S = 120.0
FORK_TIMEOUT_S = 20.0  # for a worker to have its next grader, once the last one is killed
SUSPENDED_S = 2.0  # so much longer than its limit a wait takes only where the whole job was stopped: it does not count
WALL_PER_CPU_SECOND = 20.0  # with CPU-time deadlines: how much slower than its CPU time an answer may be
LARGEST_CHUNK = 64  # items sent to a worker at a time: one line each way an item would cost more than a cheap verdict
RECYCLE_AFTER = 20_000  # answers, after which a grader makes room for a fresh one: SymPy's caches grow
MOST_PENDING = 100_000  # items beyond which `submit` waits
CANARIES_EVERY = 16_384  # answers: a step of the paper
FEWEST_TO_JUDGE = 8  # answers of a call below which their share of failures says nothing


class TooManyFailures(Fault):
    """So many answers of a call timed out or crashed that their rewards would teach nothing true."""


@dataclass(eq=False)
class _Call:
    """The items of one `grade` or `submit`: all of them once it is `complete`."""

    future: Future[list[Verdict]] = field(default_factory=Future)
    items: list[Item] = field(default_factory=list)
    verdicts: list[Verdict | None] = field(default_factory=list)
    complete: bool = False
    left: int = 0  # without a verdict
    failures: int = 0
    canaries: bool = False
    votes: bool = False  # what the answers vote for is asked, not whether they are right
    again: set[int] = field(default_factory=set)  # the items that are graded a second time

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()  # it can't be cancelled

    def add(self, items: Sequence[Item]) -> None:
        self.items += items
        self.verdicts += [None] * len(items)
        self.left += len(items)


_Job = tuple[_Call, int]  # an item of a call


class RewardPool:
    """`protocols.Rewards` over worker processes; use it as a context manager, from any thread.

    An answer that hangs or kills its grader gets the verdict timeout or crashed; the grader is replaced and the other
    answers are graded. So is the answer itself, once more, where somebody else killed the grader, such as the kernel of
    a machine without memory. With `deterministic` the deadline of an answer is CPU time (and a generous wall time
    behind it), so that a busy machine changes no verdict; without, it is wall time. In asyncio: `await
    asyncio.wrap_future(pool.submit(items))`.
    """

    def __init__(self, config: RewardConfig, deterministic: bool = True) -> None:
        self.counts: Counter[str] = Counter()  # verdicts so far, by reason
        self.replaced = 0  # graders lost and replaced
        self._config = config
        self._wall_s = config.deadline_s * (WALL_PER_CPU_SECOND if deterministic else 1.0)
        self._settings = {
            "verifier": config.verifier,
            "answer_format": config.answer_format,
            "cpu_s": config.deadline_s,
            "memory_mib": config.memory_mib,
            "recycle": RECYCLE_AFTER,
            "canaries": [[*_message(item), False] for item in canary_items(config)],
        }
        self._children: list[Child] = []
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()  # guards what `submit` shares with the thread
        self._inbox: deque[tuple[_Call, Sequence[Item] | None]] = deque()  # None: these were all
        self._pending = 0
        self._since_canaries = 0
        self._open = False
        self._wake_in, self._wake_out = -1, -1
        self._thread: threading.Thread | None = None
        self._started: Future[None] = Future()
        self._error: BaseException | None = None  # what ended the thread
        self._first_note = ""

    def __enter__(self) -> RewardPool:
        """Start the workers and grade the canaries. Raises UserError for a verifier that cannot be loaded."""
        self._wake_out, self._wake_in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._open = True
        self._thread = threading.Thread(target=self._work, name="reward pool", daemon=True)
        self._thread.start()
        try:
            self._started.result()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; none is left, not even as a zombie. Who waits for verdicts gets a RuntimeError."""
        if self._thread is None:
            return
        with self._changed:
            self._open = False
            self._changed.notify_all()
        self._wake()
        self._thread.join()
        self._thread = None
        for end in (self._wake_in, self._wake_out):
            os.close(end)

    def grade(self, items: Iterable[Item]) -> list[Verdict]:
        """One verdict an item, in order, whatever worker graded it when.

        An item is graded from the moment `items` gives it, while the next one may still be waited for. Waits while
        `MOST_PENDING` items wait for their verdicts. Raises TooManyFailures when more than `reward.max_failure_share`
        of all the items time out or crash.
        """
        call = _Call()
        for item in items:
            self._hand_in(call, [item])
        return self._complete(call).result()

    def submit(self, items: Sequence[Item]) -> Future[list[Verdict]]:
        """What `grade` would return or raise, begun. Waits while `MOST_PENDING` items wait for their verdicts."""
        return self._submit(_Call(), items)

    def votes(self, items: Sequence[Item]) -> list[str]:
        """What each answer votes for, in order; "" where it is for nothing, or where finding out took too long.

        Two answers to a problem have the same vote where the verifier takes them for the same. Always "" with a
        verifier that is none of `verifiers.VOTES`.
        """
        return [verdict.vote for verdict in self._submit(_Call(votes=True), items).result()]

    def _submit(self, call: _Call, items: Sequence[Item]) -> Future[list[Verdict]]:
        self._hand_in(call, items)
        return self._complete(call)

    def _complete(self, call: _Call) -> Future[list[Verdict]]:
        self._hand_in(call, None)
        return call.future

    def _hand_in(self, call: _Call, items: Sequence[Item] | None) -> None:
        """Give the pool's thread more items of a call, or say that there are no more."""
        with self._changed:
            if items is not None:
                self._changed.wait_for(lambda: self._pending < MOST_PENDING or not self._open)
            if self._error is not None:
                raise self._error
            if not self._open:
                raise RuntimeError("the reward pool is closed: use it inside `with RewardPool(...)`")
            self._pending += len(items or ())
            self._inbox.append((call, items))
            self._wake()

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # it is awake already
            os.write(self._wake_in, b"x")

    def _work(self) -> None:
        """The pool's thread: it owns the workers, which the kernel ends with the thread that started them."""
        try:
            for _ in range(self._config.workers or min(len(os.sched_getaffinity(0)), 16)):
                self._children.append(Child(self._settings))
            while not all(child.grader for child in self._children) and self._open:
                self._exchange()
            self._started.set_result(None)
            while self._open:
                self._take_calls()
                for child in self._children:
                    if self._jobs and child.grader and not child.jobs and not child.ended:
                        self._assign(child)
                self._exchange()
        except BaseException as error:
            self._error = error
            if self._started.done():
                self._fail(error)
            else:
                self._started.set_exception(error)
        finally:
            with self._changed:
                self._open = False
                self._changed.notify_all()
            self._fail(RuntimeError("the reward pool was closed before this was graded"))
            while self._children:
                self._children.pop().end()

    def _take_calls(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._wake_out, 4096)
        while self._inbox:
            call, items = self._inbox.popleft()
            if items is None:
                call.complete = True
                self._conclude(call)
            else:
                self._enqueue(call, items)

    def _enqueue(self, call: _Call, items: Sequence[Item]) -> None:
        first = len(call.items)
        call.add(items)
        self._jobs.extend((call, index) for index in range(first, len(call.items)))

    def _fail(self, error: BaseException) -> None:
        """Every call that has no result yet raises `error`."""
        calls = {call for call, _ in self._jobs} | {call for child in self._children for call, _ in child.jobs}
        for call in calls | {call for call, _ in self._inbox}:
            if not call.future.done():
                call.future.set_exception(error)
        self._jobs.clear()
        self._inbox.clear()

    def _assign(self, child: Child) -> None:
        """Give an idle worker the next items: large chunks first, single ones at the end, so that all end together."""
        size = max(1, min(LARGEST_CHUNK, len(self._jobs) // (2 * len(self._children))))
        while self._jobs and len(child.jobs) < size:
            job = self._jobs.popleft()
            if job[0].future.done():  # it failed
                self._release(1)
            else:
                child.jobs.append(job)
        if child.jobs:
            child.taken = False
            child.send([[*_message(call.items[index]), call.votes] for call, index in child.jobs])

    def _exchange(self) -> None:
        """Wait for the workers, at most to the next deadline, and take what they have to say.

        Replaces the graders that died or passed a deadline; their other items go back to the front.
        """
        poller = select.poll()
        poller.register(self._wake_out, select.POLLIN)
        for child in self._children:
            poller.register(child.stdout, select.POLLIN)
            if child.sending:
                poller.register(child.stdin, select.POLLOUT)
        deadlines = [child.sign_of_life + limit for child in self._children if (limit := self._limit(child))]
        asleep = time.monotonic()
        wait_s = max(0.0, min(deadlines, default=asleep + 1.0) - asleep)
        ready = {fd for fd, _ in poller.poll(wait_s * 1000 + 1)}
        now = time.monotonic()
        if now - asleep > wait_s + SUSPENDED_S:
            for child in self._children:
                child.sign_of_life += now - asleep
        for position, child in enumerate(self._children):
            if child.stdin in ready:
                child.flush()
            if child.stdout in ready:
                self._receive(child)
            limit = self._limit(child)
            late = limit is not None and now - child.sign_of_life > limit
            if late and child.grader and not child.overran:
                child.kill_grader()
            elif late or child.ended or child.out_of_step:
                self._bury(child)
                self._children[position] = Child(self._settings)

    def _limit(self, child: Child) -> float | None:
        """Seconds that a worker may be silent; None for an idle one."""
        if not child.grader:
            return START_TIMEOUT_S
        if child.overran:
            return FORK_TIMEOUT_S
        return self._wall_s if child.jobs else None

    def _receive(self, child: Child) -> None:
        for message in child.receive():
            if isinstance(message, list):
                correct, reason, seconds, note, vote = message
                self._take_note(note)
                self._settle(child.jobs.popleft(), Verdict(correct, reason, seconds, vote))
            elif "taken" in message:
                child.taken = True
            elif "error" in message:
                raise UserError(message["error"])
            elif "ready" in message:
                check_canaries(self._config, message["canaries"])
                child.grader = message["ready"]
            else:
                child.grader = message["grader"]
                if message["died"] is not None and child.jobs and not child.taken:
                    child.out_of_step = True
                    return  # what the next one has said already is of what it found in the pipe
                elif message["died"] is not None:
                    self._lost(child, message["died"])

    def _bury(self, child: Child) -> None:
        """End a worker that is beyond use as a whole."""
        late = not child.ended
        code = child.end()
        if not child.grader:
            cause = f"not within {START_TIMEOUT_S:g} s" if late else f"it ended with code {code}"
            raise RuntimeError(f"a reward worker for the verifier {self._config.verifier!r} did not start: {cause}")
        self._lost(child, code)

    def _lost(self, child: Child, code: int) -> None:
        """A grader died: the verdict of the item it was at; the others go back to the front."""
        self.replaced += 1
        if child.jobs:
            job = child.jobs.popleft()
            self._jobs.extendleft(reversed(child.jobs))
            child.jobs.clear()
            call, index = job
            if code == -signal.SIGKILL and not child.overran and index not in call.again:  # no limit of ours kills so
                call.again.add(index)
                self._jobs.appendleft(job)
                return
            if child.overran or code == -signal.SIGPROF:
                self._take_note(f"no verdict within reward.deadline_s={self._config.deadline_s:g}")
                reason = "timeout"
            else:
                self._take_note(f"the worker ended with code {code}")
                reason = "crashed"
            seconds = self._wall_s if child.overran else time.monotonic() - child.sign_of_life
            self._settle(job, Verdict(False, reason, seconds))
        child.overran = False

    def _settle(self, job: _Job, verdict: Verdict) -> None:
        call, index = job
        beat()
        self._release(1)
        if call.future.done():
            return
        call.verdicts[index] = verdict
        call.left -= 1
        call.failures += verdict.reason in ("timeout", "crashed")
        self._conclude(call)

    def _conclude(self, call: _Call) -> None:
        """End a call that has failed, or has all its verdicts."""
        if not call.complete:  # a share of all its items can't be told yet
            return
        judged = not (call.votes or call.canaries)
        share, size = self._config.max_failure_share, len(call.items)
        if judged and call.failures > max(share * max(size, FEWEST_TO_JUDGE), 1):
            call.future.set_exception(
                TooManyFailures(
                    f"{call.failures} of {size} answers timed out or crashed in the verifier "
                    f"{self._config.verifier!r}, more than reward.max_failure_share={share:g} allows "
                    f"(reward.deadline_s={self._config.deadline_s:g}, reward.memory_mib={self._config.memory_mib}); "
                    f"the first: {self._first_note}"
                )
            )
        elif not call.left:
            self._finish(call, [verdict for verdict in call.verdicts if verdict is not None])

    def _finish(self, call: _Call, verdicts: list[Verdict]) -> None:
        if call.canaries:
            check_canaries(self._config, [(verdict.correct, verdict.reason) for verdict in verdicts])
        elif not call.votes:
            self.counts.update(verdict.reason for verdict in verdicts)
            self._since_canaries += len(verdicts)
        call.future.set_result(verdicts)
        if self._since_canaries >= CANARIES_EVERY and (items := canary_items(self._config)):
            self._since_canaries = 0
            with self._changed:
                self._pending += len(items)
            self._enqueue(_Call(complete=True, canaries=True), items)

    def _release(self, items: int) -> None:
        with self._changed:
            self._pending -= items
            self._changed.notify_all()

    def _take_note(self, note: str) -> None:
        if note and not self._first_note:
            self._first_note = note
            logger.warning("first answer that the verifier %r failed on: %s", self._config.verifier, note)


def _message(item: Item) -> list[Any]:
    problem, response, truncated = item
    return [problem.id, problem.problem, problem.answer, problem.source, problem.meta, response, truncated]
