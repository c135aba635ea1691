"""Simulated engines on a virtual clock, which drive the real controller (`rloop_mcore/rollout/controller.py`).

No socket is opened and nobody sleeps: the clock jumps to the next timer whenever nothing is left to do, so an hour of
4,096 engines takes seconds. What is simulated is the servers and their clients, and the weights' way into an engine.

What is assumed:
- response lengths are lognormal (sigma 0.8, median a quarter of the maximum) and cut at the maximum: about a third of
  it on average, about 4 % reach it. That rollouts are long-tailed is published (arXiv 2605.30859, for one); the
  parameters are ours, those of `engine.py`.
- an engine decodes all its samples together, each at 100 tokens/s when alone, at half of it beside 128 others.
- an engine fails at a constant rate, and dies, hangs or answers 500 equally often.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import random
import selectors
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np

from rloop_mcore.rollout.client import EngineClient, EngineError
from rloop_mcore.rollout.controller import Controller, Probe
from rloop_mcore.types import Completion, SampleRequest, Sampling

T = TypeVar("T")

SIGMA, MEDIAN_SHARE = 0.8, 0.25
TOKENS_PER_S, HALVED_BY = 100.0, 128  # of one sample alone; so many beside it halve its speed
FAULTS = ("dead", "hung", "errors")
_STATUSES = {"errors": 500, "full": 503, "refuses": 400}
_RESTART_S, _CATCH_UP_S = 180.0, 10.0  # until an engine that failed is back; until it holds the weights
_TIMEOUT_S = 600.0  # of a call
_SHARES = np.minimum(np.random.default_rng(0).lognormal(math.log(MEDIAN_SHARE), SIGMA, 2**16), 1.0).tolist()


class _Clock(selectors.SelectSelector):
    """Where a loop would sleep until its next timer, the time moves on to it."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("every task waits, and there is no timer that could wake one")
        self.now += max(timeout, 0.0)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in virtual seconds, for one thread that does no input or output."""

    def __init__(self) -> None:
        self._clock = _Clock()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


def run_virtually(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work` on a virtual clock that starts at 0; RuntimeError where it would wait for ever."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)


def length_of(seed: int, longest: int) -> int:
    """How many tokens the response to the request with this seed has, whichever engine samples it."""
    return max(1, round(_SHARES[seed % len(_SHARES)] * longest))


def make_requests(groups: int, size: int, first: int = 0) -> list[SampleRequest]:
    """`size` requests a prompt; no two have the same seed."""
    return [SampleRequest((g,), g * size + i) for g in range(first, first + groups) for i in range(size)]


@dataclass(eq=False)
class _Job:
    """A /generate call at an engine."""

    requests: Sequence[SampleRequest]
    longest: int
    begun: float  # tokens that the batch had decoded when the job joined it
    done: asyncio.Future[None]
    targets: list[int] = field(default_factory=list)
    left: int = 0

    def completions(self, decoded: float, version: int, number: int) -> list[Completion]:
        """Ids are the request's seed and logprobs the engine's number, so that a test sees who answered what."""
        answer = []
        for request, target in zip(self.requests, self.targets, strict=True):
            before = request.partial or Completion((), (), "abort", ())
            had = len(before.response_ids)
            new = min(target - had, max(0, int(decoded - self.begun + 1e-6)))
            reason = "abort" if had + new < target else "length" if target == self.longest else "stop"
            versions = (*before.weight_versions, *(((version, new),) if new else ()))
            ids, logprobs = (request.seed,) * new, (float(number),) * new
            answer.append(Completion(before.response_ids + ids, before.logprobs + logprobs, reason, versions))
        return answer


class _Batch:
    """What an engine decodes: all samples advance at one speed, which is the lower the more there are."""

    def __init__(self, tokens_per_s: float) -> None:
        """tokens_per_s: of a sample alone."""
        self.tokens_per_s = tokens_per_s
        self.decoded = 0.0  # tokens that a sample would have which had been there from the beginning
        self.busy_s = 0.0
        self.speed = 1.0  # 0: it stands still
        self.most = 0  # samples at once
        self._since = 0.0
        self._samples: list[tuple[float, int, _Job]] = []  # heap of (decoded when it ends, serial, job)
        self._serial = 0
        self._timer: asyncio.TimerHandle | None = None

    def add(self, job: _Job) -> None:
        self._advance()
        job.begun = self.decoded
        for request in job.requests:
            target = length_of(request.seed, job.longest)
            job.targets.append(target)
            left = target - (len(request.partial.response_ids) if request.partial else 0)
            if left > 0:
                job.left += 1
                self._serial += 1
                heapq.heappush(self._samples, (self.decoded + left, self._serial, job))
        self.most = max(self.most, len(self._samples))
        self._arm()

    def remove(self, job: _Job) -> None:
        """End a job where it is; nothing where it has ended."""
        self._advance()
        if job.left:
            job.left = 0
            self._samples = [sample for sample in self._samples if sample[2] is not job]
            heapq.heapify(self._samples)
            self._arm()

    def set_speed(self, speed: float) -> None:
        self._advance()
        self.speed = speed
        self._arm()

    def _rate(self) -> float:
        return self.speed * self.tokens_per_s / (1 + (len(self._samples) - 1) / HALVED_BY)

    def _advance(self) -> None:
        now = asyncio.get_running_loop().time()
        if self._samples:
            self.decoded += (now - self._since) * self._rate()
            self.busy_s += now - self._since
        self._since = now

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._samples and self.speed:
            wait = (self._samples[0][0] - self.decoded) / self._rate()
            self._timer = asyncio.get_running_loop().call_later(wait, self._finish)

    def _finish(self) -> None:
        self._advance()
        while self._samples and self._samples[0][0] <= self.decoded + 1e-6:
            job = heapq.heappop(self._samples)[2]
            job.left -= 1
            if not job.left and not job.done.done():
                job.done.set_result(None)
        self._arm()


class SimulatedServer:
    """The process of an engine, which a test can break.

    fault: dead (connections fail at once), hung (it answers nothing, health neither), stuck (health only), errors (it
    answers 500), full (503), refuses (400), or None.
    """

    def __init__(self, number: int, tokens_per_s: float) -> None:
        self.number, self.url = number, f"sim://{number}"
        self.version = -1
        self.fault: str | None = None
        self.comes_back = True
        self.batch = _Batch(tokens_per_s)
        self.client: SimulatedClient | None = None
        self._up_at = 0.0

    async def ready(self, timeout_s: float) -> tuple[str, str | None]:
        wait = self._up_at - asyncio.get_running_loop().time()
        await asyncio.sleep(min(max(wait, 0.0), timeout_s))
        if wait > timeout_s:
            raise EngineError(f"{self.url} was not ready within {timeout_s:g} s")
        return self.url, None

    def failure(self) -> str | None:
        return f"{self.url} ended with status -9" if self.fault == "dead" else None

    async def restart(self) -> None:
        self.fail("dead")
        self.batch.set_speed(1.0)
        self.fault, self.version = None, -1
        self._up_at = asyncio.get_running_loop().time() + (_RESTART_S if self.comes_back else math.inf)

    def stop(self) -> None:
        pass

    def fail(self, fault: str) -> None:
        self.fault = fault
        if fault == "dead" and self.client is not None:
            self.client.fail(EngineError(f"{self.url}: connection reset", engine=self.url))
        elif fault in ("hung", "stuck"):
            self.batch.set_speed(0.0)


class SimulatedClient:
    """What the controller uses of `EngineClient`, without the HTTP."""

    def __init__(self, server: SimulatedServer, sent: Callable[[str, int], None]) -> None:
        self.url, self.server, self._sent, self.generate_timeout_s = server.url, server, sent, _TIMEOUT_S
        self._jobs: dict[str, _Job] = {}
        self._known: set[str] = set()
        self._waiting: set[asyncio.Future[None]] = set()
        self._given_up: str | None = None

    async def generate(self, requests: Sequence[SampleRequest], sampling: Sampling, rid: str) -> list[Completion]:
        self._reach()
        if rid in self._known:  # what failed may still be known to SGLang
            raise EngineError(f"{self.url}/generate: Duplicate request ID detected: {rid}", 400)
        self._known.add(rid)
        self._sent(rid, self.server.number)
        status = _STATUSES.get(self.server.fault or "")
        if status is not None:
            await asyncio.sleep(0.01)
            raise EngineError(f"{self.url}/generate: status {status}", status, self.url)
        if requests[0].prompt_ids[0] < 0:
            raise EngineError(f"{self.url}/generate: id {requests[0].prompt_ids[0]} is outside the vocabulary", 400)
        job = _Job(requests, sampling.max_tokens, 0.0, asyncio.get_running_loop().create_future())
        batch = self.server.batch
        batch.add(job)
        self._jobs[rid] = job
        try:
            await self._answer(job.done, _TIMEOUT_S)
        finally:
            del self._jobs[rid]
            batch.remove(job)
        return job.completions(batch.decoded, self.server.version, self.server.number)

    async def abort(self, rid: str, count: int) -> None:
        """A server ignores a name it does not know."""
        await self.health(60.0)
        if rid in self._jobs and not self._jobs[rid].done.done():
            self._jobs[rid].done.set_result(None)

    async def health(self, timeout_s: float = 60.0) -> None:
        self._reach()
        if self.server.fault == "hung":
            await self._answer(asyncio.get_running_loop().create_future(), timeout_s)

    async def check_server(self, timeout_s: float) -> None:
        await self.health(timeout_s)

    def give_up(self, reason: str) -> None:
        self._given_up = reason
        self.fail(EngineError(f"{self.url}: {reason}", engine=self.url))

    async def close(self) -> None:
        pass

    def fail(self, error: EngineError) -> None:
        """End what is under way."""
        for future in self._waiting:
            if not future.done():
                future.set_exception(error)

    def _reach(self) -> None:
        if self._given_up is not None:
            raise EngineError(f"{self.url}: {self._given_up}", engine=self.url)
        if self.server.fault == "dead":
            raise EngineError(f"{self.url}: connection refused", engine=self.url)

    async def _answer(self, future: asyncio.Future[None], timeout_s: float) -> None:
        def expire() -> None:
            if not future.done():
                future.set_exception(EngineError(f"{self.url}: no answer within {timeout_s:g} s", engine=self.url))

        timer = asyncio.get_running_loop().call_later(timeout_s, expire)
        self._waiting.add(future)
        try:
            await future
        finally:
            timer.cancel()
            self._waiting.discard(future)


class SimulatedFleet:
    """Servers under a real controller; on entering, all of them serve weights of version 1."""

    def __init__(
        self,
        engines: int,
        *,
        limit: int = 256,
        failures_per_hour: float = 0.0,
        tokens_per_s: float = TOKENS_PER_S,
        seed: int = 0,
    ) -> None:
        """failures_per_hour: of an engine."""
        self.servers = [SimulatedServer(number, tokens_per_s) for number in range(engines)]
        self.version = 1
        self.sent: dict[str, list[tuple[float, int]]] = {}  # a call's name: when it was sent to which engine
        self.controller = Controller(
            self.servers,
            self._connect,
            limit=limit,
            start_timeout_s=600.0,
            probe=Probe(),
            on_waiting=self._catch_up_later,
        )
        self._failures_per_hour = failures_per_hour
        self._random = random.Random(seed)
        self._timers: dict[int, asyncio.TimerHandle] = {}  # an engine's next failure

    async def __aenter__(self) -> SimulatedFleet:
        await self.controller.start()
        self.sync(1)
        for server in self.servers:
            self._fail_later(server)
        return self

    async def __aexit__(self, *_: object) -> None:
        for timer in self._timers.values():
            timer.cancel()
        await self.controller.close()

    def sync(self, version: int) -> None:
        """Every engine that answers holds `version` now."""
        self.version = version
        self._promote("waiting", "serving")

    def _promote(self, *states: str) -> None:
        engines = self.controller.in_state(*states)
        for engine in engines:
            self.servers[engine.number].version = self.version
        self.controller.promote(engines, self.version)

    def _catch_up_later(self) -> None:
        asyncio.get_running_loop().call_later(_CATCH_UP_S, self._promote, "waiting")

    def _fail_later(self, server: SimulatedServer, strike: bool = False) -> None:
        """An engine's failures are a Poisson process; one that is broken already is left as it is."""
        if strike and server.fault is None:
            server.fail(self._random.choice(FAULTS))
        if self._failures_per_hour:
            wait = self._random.expovariate(self._failures_per_hour) * 3600.0
            self._timers[server.number] = asyncio.get_running_loop().call_later(wait, self._fail_later, server, True)

    def _connect(self, url: str, key: str | None) -> EngineClient:
        server = self.servers[int(url.removeprefix("sim://"))]
        server.client = SimulatedClient(server, self._note)
        return cast(EngineClient, server.client)

    def _note(self, rid: str, number: int) -> None:
        self.sent.setdefault(rid.rpartition(".")[0], []).append((asyncio.get_running_loop().time(), number))
