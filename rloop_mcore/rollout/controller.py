"""The controller of many engines: which one gets what, and what happens when one is slow, hung, dead or wrong.

    call      consecutive requests of one group, or an engine's whole share in deterministic mode
    serving   the engine answers and holds the current weights; only such engines get calls
    waiting   it answers, but has to be brought to the current weights first
    lost      it failed; its process is started anew, its calls go to other engines
    dead      it was started anew in vain

A call's completions are used from one answer only, and each request is answered once. A lost engine is never asked
again under its old connection, so no late answer can slip in, and it rejoins with verified weights only.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import logging
import random
import time
import uuid
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from typing import Any, Protocol

from rloop_mcore.platform.heartbeat import beat
from rloop_mcore.protocols import Answered
from rloop_mcore.rollout.client import EngineClient, EngineError
from rloop_mcore.rollout.together import together
from rloop_mcore.types import Completion, SampleRequest, Sampling

log = logging.getLogger(__name__)

_ATTEMPTS = 5  # engines that may fail one call before it is an error
_FAILURES = 3  # calls in a row that an engine may fail (with 500s, broken answers) before it is lost
_RESTARTS = 3  # restarts in a row without a good answer before an engine is dead
_POLL_S = 0.2
_ABORT_AGAIN_S = 2.0  # an abort that overtakes its call is lost
_FAULTS_OF_THE_REQUEST = (400, 401, 403, 404, 413, 422)  # where two engines say so
_NO_ROOM = (429, 503)  # a full queue, SGLang's or that of a proxy
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0  # before an engine that has no room is asked again
_JITTER = random.Random()  # not the one that a run seeds
_NOTHING = Completion((), (), "abort", ())  # of a request that no engine was asked


class Server(Protocol):
    """The process behind an engine (`launch.py`)."""

    async def ready(self, timeout_s: float) -> tuple[str, str | None]: ...

    def failure(self) -> str | None: ...

    async def restart(self) -> None: ...

    def stop(self) -> None: ...


@dataclass(frozen=True)
class Probe:
    """When an engine that says nothing is asked for its health, and how long it has to answer."""

    every_s: float = 10.0
    deadline_s: float = 30.0


@dataclass(eq=False)
class Engine:
    """A server as the controller sees it."""

    server: Server
    number: int
    client: EngineClient | None = None
    state: str = "starting"
    running: int = 0  # samples it was asked for and has not answered
    failures: int = 0
    restarts: int = 0
    told: bool = False  # that it has no room, in the log
    heard: float = 0.0  # when it last answered
    asked: bool = False  # for its health, now


@dataclass(eq=False)
class _Call:
    requests: list[SampleRequest]
    name: str
    rid: str = ""  # of the last time it was sent; SGLang refuses one that it still knows, of a time that failed
    sent: int = 0  # how often
    waited_s: float = 0.0  # for engines that had no room
    refused: bool = False  # by an engine, as a fault of the request
    granted: asyncio.Future[Engine | None] | None = None  # done while in the queue: cancelled or aborted there
    engine: Engine | None = None
    failed_by: Engine | None = None  # the last one
    aborted: bool = False
    answer: list[Completion] | None = None

    @property
    def unfinished(self) -> list[Completion]:
        """The answer of a call that no engine was asked: what each request had already."""
        return [r.partial or _NOTHING for r in self.requests]


@dataclass
class Counters:
    """What went wrong so far."""

    retries: int = 0
    lost: int = 0
    restarts: int = 0
    aborted: int = 0
    reasons: list[str] = field(default_factory=list)


class Controller:
    """Runs on one event loop; knows nothing of threads, nor of how weights get into an engine."""

    def __init__(
        self,
        servers: Sequence[Server],
        connect: Callable[[str, str | None], EngineClient],
        *,
        limit: int,
        start_timeout_s: float,
        probe: Probe,
        on_waiting: Callable[[], None],
    ) -> None:
        """limit: samples an engine is asked for at once; on_waiting: called when an engine waits for weights."""
        self.engines = [Engine(server, number) for number, server in enumerate(servers)]
        self.counters = Counters()
        self._connect, self._limit, self._start_timeout_s, self._probe = connect, limit, start_timeout_s, probe
        self._on_waiting = on_waiting
        self._queue: deque[_Call] = deque()
        self._loads: list[tuple[int, int]] = []  # heap of (running, engine number); outdated entries are skipped
        self._sleeping = False
        self._versions = (-1, -1)  # oldest and newest weights that a serving engine holds
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Wait until every server answers. Raises EngineError with the log of one that does not.

        A server that has ended is started once more: it may have been killed while nobody asked it anything yet.
        """

        async def begin(engine: Engine) -> None:
            try:
                await self._reach(engine)
            except EngineError as error:
                if engine.server.failure() is None:
                    raise
                log.warning("engine %d has ended and is started once more: %s", engine.number, error)
                await engine.server.restart()
                await self._reach(engine)
            engine.state = "waiting"

        await together(*(begin(engine) for engine in self.engines))
        self._spawn(self._watch())

    async def close(self) -> None:
        """End the background work and the connections; the servers are the caller's."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(e.client.close() for e in self.engines if e.client is not None))

    # -- what others ask ------------------------------------------------------------------------------------------

    def in_state(self, *states: str) -> list[Engine]:
        return [engine for engine in self.engines if engine.state in states]

    def expect(self, version: int) -> None:
        """A sync to `version` begins: engines that it resumes may answer before `promote` says that they hold it."""
        self._versions = (self._versions[0], max(self._versions[1], version))

    def promote(self, engines: Sequence[Engine], version: int) -> None:
        """These engines hold the weights `version`, verified: they get calls from now on."""
        self._sleeping = False
        for engine in engines:
            if engine.state in ("waiting", "serving"):
                engine.state = "serving"
                self._offer(engine)
        everyone = set(self.in_state("serving")) <= set(engines)
        self._versions = (version if everyone else min(self._versions[0], version), version)
        self._dispatch()

    async def sleep(self) -> None:
        """Have the engines give up their memory; they wait for weights then. Nothing may be under way."""
        self._sleeping = True

        async def put(engine: Engine, client: EngineClient) -> None:
            engine.state = "waiting"
            try:
                await client.sleep()
            except EngineError as error:
                self.lose(engine, str(error))

        awake = [(e, e.client) for e in self.in_state("waiting", "serving") if e.client and not e.client.asleep]
        await asyncio.gather(*(put(engine, client) for engine, client in awake))

    async def generate(
        self,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        shares: int = 0,
        enough: int | None = None,
        answered: Answered | None = None,
    ) -> list[Completion]:
        """One completion a request, in order. Raises EngineError.

        A call goes to the engine that has least to do, in the order of the requests. shares: cut the requests into
        that many calls, group k into call k mod `shares`, so that what is decoded beside what depends on nothing but
        the requests; 0: a call a group. enough: abort the rest once that many calls are answered; what is not finished
        then comes back with finish reason abort. answered: told of each call's completions when an engine answers it.
        """
        cut = _cut(requests, shares)
        run = uuid.uuid4().hex
        calls = [_Call([requests[i] for i in rows], f"{run}-{number}") for number, rows in enumerate(cut)]

        async def serve(rows: Sequence[int], call: _Call) -> None:
            await self._serve(call, sampling)
            if answered is not None and call.answer is not None:
                answered(rows, call.answer)

        tasks = [asyncio.ensure_future(serve(rows, call)) for rows, call in zip(cut, calls, strict=True)]
        try:
            if enough is None:
                await asyncio.gather(*tasks)
            else:
                for finished in islice(asyncio.as_completed(tasks), enough):
                    await finished
            while rest := [(call, task) for call, task in zip(calls, tasks, strict=True) if not task.done()]:
                await self._abort([call for call, _ in rest])
                await asyncio.wait([task for _, task in rest], timeout=_ABORT_AGAIN_S)
            for task in tasks:
                task.result()
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        completions = [_NOTHING] * len(requests)
        for rows, call in zip(cut, calls, strict=True):
            for row, completion in zip(rows, call.answer or call.unfinished, strict=True):
                completions[row] = completion
        return completions

    def lose(self, engine: Engine, reason: str) -> None:
        """Fence an engine: nothing is asked of it any more; its server is started anew."""
        if engine.state in ("lost", "dead"):
            return
        engine.state = "lost"
        self.counters.lost += 1
        self.counters.reasons.append(reason)
        ended = engine.server.failure()
        reason = f"{reason}\n{ended}" if ended and ended not in reason else reason
        log.warning("engine %d is lost: %s", engine.number, reason)
        if engine.client is not None:
            engine.client.give_up(reason)
        self._spawn(self._recover(engine, reason))

    async def check_health(self) -> None:
        """Ask every engine that should answer now; those that don't are lost."""
        await asyncio.gather(*(self._ask_health(engine) for engine in self.in_state("waiting", "serving")))

    # -- calls ----------------------------------------------------------------------------------------------------

    async def _serve(self, call: _Call, sampling: Sampling) -> None:
        """Have `call` answered by one engine or another."""
        for attempt in range(1, _ATTEMPTS + 1):
            engine = await self._acquire(call, first=attempt > 1)
            if engine is None:
                return
            call.engine, client = engine, engine.client
            assert client is not None
            try:
                if not call.aborted:
                    call.answer = await self._answer(engine, client, call, sampling)
                return
            except EngineError as error:
                if error.status in _FAULTS_OF_THE_REQUEST:
                    if call.aborted:  # SGLang 0.5.17 refuses what is aborted before it has read it
                        return
                    if error.engine is None or call.refused:
                        raise
                    call.refused = True
                engine.failures += 1
                died = error.status is None or engine.server.failure() is not None
                if engine.client is client and (died or engine.failures >= _FAILURES):
                    self.lose(engine, str(error))
                if call.aborted:
                    return
                if attempt == _ATTEMPTS:
                    raise EngineError(f"{attempt} engines failed one call; the last: {error}", error.status) from error
                call.failed_by = engine
                self.counters.retries += 1
                log.warning("a call is sent again, to another engine if there is one: %s", error)
            finally:
                call.engine = None
                self._release(engine, call)

    async def _answer(self, engine: Engine, client: EngineClient, call: _Call, sampling: Sampling) -> list[Completion]:
        """The engine's answer, checked, with who gave it and when."""
        oldest = self._versions[0]
        started, begun = time.time(), time.monotonic()
        answer = await self._ask(engine, client, call, sampling)
        seconds = time.monotonic() - begun
        for request, completion in zip(call.requests, answer, strict=True):
            self._check(client.url, request, completion, sampling, oldest)
            if completion.finish_reason == "abort" and not call.aborted:
                raise EngineError(f"{client.url}: a sample was aborted that the run did not abort", 200)
        beat()
        engine.failures = engine.restarts = 0
        engine.heard = asyncio.get_running_loop().time()
        return [
            _signed(completion, request.partial, engine.number, started, seconds)
            for request, completion in zip(call.requests, answer, strict=True)
        ]

    async def _ask(self, engine: Engine, client: EngineClient, call: _Call, sampling: Sampling) -> list[Completion]:
        """The engine's answer. One that has no room is asked again, ever later, while the call's time lasts."""
        longest = _FIRST_PAUSE_S
        while True:
            call.sent += 1
            call.rid = f"{call.name}.{call.sent}"
            try:
                return await client.generate(call.requests, sampling, call.rid)
            except EngineError as error:
                pause = error.retry_after_s + _JITTER.uniform(0.5, 1.0) * longest
                if error.status not in _NO_ROOM or call.waited_s + pause > client.generate_timeout_s:
                    raise
                no_room = error
            if not engine.told:
                engine.told = True
                log.warning("engine %d has no room, and is asked again later (said once): %s", engine.number, no_room)
            with contextlib.suppress(EngineError, OSError):  # those of the samples that it had room for
                await client.abort(call.rid, len(call.requests))
            longest = min(2 * longest, _LONGEST_PAUSE_S)
            call.waited_s += pause
            until = asyncio.get_running_loop().time() + pause
            while (left := until - asyncio.get_running_loop().time()) > 0:
                if call.aborted or engine.state != "serving":
                    raise no_room
                await asyncio.sleep(min(left, _POLL_S))

    async def _acquire(self, call: _Call, first: bool) -> Engine | None:
        """The engine that is to serve `call`; None where the call was aborted before one was free."""
        granted = call.granted = asyncio.get_running_loop().create_future()
        self._queue.appendleft(call) if first else self._queue.append(call)
        self._dispatch()
        try:
            return await granted
        except asyncio.CancelledError:
            if not granted.cancelled() and granted.exception() is None and (engine := granted.result()) is not None:
                self._release(engine, call)  # granted and cancelled in the same turn of the loop
            else:
                self._dispatch()  # those behind it may fit
            raise

    def _release(self, engine: Engine, call: _Call) -> None:
        """`call` no longer runs at `engine`."""
        engine.running -= len(call.requests)
        self._offer(engine)
        self._dispatch()

    def _dispatch(self) -> None:
        """Give the calls in the queue, oldest first, to the least loaded engines, as far as these take more."""
        while self._queue:
            call = self._queue[0]
            granted, count = call.granted, len(call.requests)
            assert granted is not None
            if granted.done():
                self._queue.popleft()
                continue
            engine = self._least_loaded(call.failed_by)
            if engine is None:
                if not all(e.state == "dead" for e in self.engines):
                    return
                reason = self.counters.reasons[-1]
                granted.set_exception(EngineError(f"no engine is left; the last failed so: {reason}"))
                continue
            if engine.running and engine.running + count > self._limit:
                return
            self._queue.popleft()
            engine.running += count
            self._offer(engine)
            granted.set_result(engine)

    def _offer(self, engine: Engine) -> None:
        """Enter the load of an engine, which has changed."""
        if engine.state == "serving":
            heapq.heappush(self._loads, (engine.running, engine.number))
        if len(self._loads) > 4 * len(self.engines):  # mostly outdated
            self._loads = [(e.running, e.number) for e in self.in_state("serving")]
            heapq.heapify(self._loads)

    def _least_loaded(self, last: Engine | None) -> Engine | None:
        """The serving engine that has least to do; `last` only where no other serves."""
        passed = found = None
        while self._loads and found is None:
            running, number = self._loads[0]
            engine = self.engines[number]
            if engine.state == "serving" and engine.running == running and engine is not last:
                found = engine
                continue
            if engine.state == "serving" and engine is last:
                passed = engine
            heapq.heappop(self._loads)
        if passed is not None:
            self._offer(passed)
        return found or passed

    async def _abort(self, calls: Sequence[_Call]) -> None:
        """End these calls: those in the queue unanswered, those at an engine with what it has sampled."""
        for call in calls:
            self.counters.aborted += not call.aborted
            call.aborted = True
            if call.granted is not None and not call.granted.done():
                call.granted.set_result(None)
        at_engines = [(call, call.engine.client) for call in calls if call.engine is not None]
        await asyncio.gather(
            *(client.abort(call.rid, len(call.requests)) for call, client in at_engines if client is not None),
            return_exceptions=True,  # an engine that fails here fails the call, which then ends unanswered
        )

    def _check(self, url: str, request: SampleRequest, completion: Completion, sampling: Sampling, oldest: int) -> None:
        if completion.finish_reason not in ("stop", "length", "abort"):
            raise EngineError(f"{url}: a sample ended with finish reason {completion.finish_reason!r}", engine=url)
        tokens = len(completion.response_ids)
        if not (completion.finish_reason == "abort" or tokens) or tokens > sampling.max_tokens:
            raise EngineError(f"{url}: a sample has {tokens} tokens, 1..{sampling.max_tokens} were asked", engine=url)
        if tokens == len(request.drawn):
            return  # aborted before its first token: no version sampled anything here
        version, newest = completion.weight_versions[-1][0], self._versions[1]
        if not oldest <= version <= newest:
            text = f"{url}: a sample has weight version {version}, synced were {oldest} to {newest}"
            raise EngineError(text, engine=url)

    # -- engines --------------------------------------------------------------------------------------------------

    async def _reach(self, engine: Engine) -> None:
        """Connect once the server answers and accepts the key."""
        deadline = asyncio.get_running_loop().time() + self._start_timeout_s
        url, key = await engine.server.ready(self._start_timeout_s)
        client = self._connect(url, key)
        try:
            while True:
                left = deadline - asyncio.get_running_loop().time()
                try:
                    await client.check_server(max(left, _POLL_S))
                    break
                except EngineError as error:
                    ended = engine.server.failure()
                    if ended is not None:
                        raise EngineError(f"{error}\n{ended}") from error
                    # a proxy in front of it says 429, 502 or 503
                    starting = error.status is None or error.status == 429 or error.status >= 500
                    if not starting or left < 0:
                        raise
                await asyncio.sleep(_POLL_S)
        except BaseException:
            await client.close()
            raise
        if engine.client is not None:
            await engine.client.close()
        engine.client, engine.failures = client, 0
        engine.heard = asyncio.get_running_loop().time()

    async def _recover(self, engine: Engine, reason: str) -> None:
        """Start the server anew, until it answers or has failed too often."""
        while engine.restarts < _RESTARTS:
            engine.restarts += 1
            self.counters.restarts += 1
            try:
                await engine.server.restart()
                await self._reach(engine)
                if self._sleeping and engine.client is not None:
                    await engine.client.sleep()
            except (EngineError, OSError) as error:  # OSError: no process is to be had, or the old one does not end
                log.warning("engine %d does not come back: %s", engine.number, error)
                reason = str(error)
                continue
            log.warning("engine %d is back and waits for weights", engine.number)
            engine.state = "waiting"
            self._on_waiting()
            return
        engine.state = "dead"
        self.counters.reasons.append(reason)
        log.error("engine %d is given up after %d restarts: %s", engine.number, _RESTARTS, reason)
        self._on_waiting()
        self._dispatch()

    async def _watch(self) -> None:
        """Ask engines that have said nothing for a while for their health."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._probe.every_s)
            for engine in self.in_state("waiting", "serving"):
                if not engine.asked and loop.time() - engine.heard >= self._probe.every_s:
                    self._spawn(self._ask_health(engine))

    async def _ask_health(self, engine: Engine) -> None:
        client = engine.client
        assert client is not None
        engine.asked = True
        try:
            await client.health(self._probe.deadline_s)
            engine.heard = asyncio.get_running_loop().time()
        except EngineError as error:
            if engine.client is client:
                self.lose(engine, str(error))
        except OSError as error:  # no fault of the engine's: this process has no socket left
            log.warning("engine %d cannot be asked for its health: %s", engine.number, error)
        finally:
            engine.asked = False

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _signed(
    completion: Completion, partial: Completion | None, engine: int, started: float, seconds: float
) -> Completion:
    """The answer with who gave it, and when; what an aborted part took counts."""
    if partial is not None:
        started, seconds = partial.started, partial.seconds + seconds
    return replace(completion, engine=engine, started=started, seconds=seconds)


def _cut(requests: Sequence[SampleRequest], shares: int) -> list[list[int]]:
    """Indices of the requests of each call; groups stay together."""
    of_group = groupby(range(len(requests)), key=lambda i: (requests[i].prompt_ids, requests[i].group))
    groups = [list(rows) for _, rows in of_group]
    if not shares:
        return groups
    cut: list[list[int]] = [[] for _ in range(shares)]
    for number, group in enumerate(groups):
        cut[number % shares] += group
    return [share for share in cut if share]
