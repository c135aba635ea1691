"""All engines behind `protocols.Rollout`: a blocking face on the controller and the weight sync."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rloop_mcore.errors import UserError
from rloop_mcore.protocols import Answered, WeightChannel
from rloop_mcore.rollout.client import ADOPTED, EngineClient, EngineError
from rloop_mcore.rollout.controller import Controller, Engine, Probe, Server
from rloop_mcore.rollout.launch import stop_all
from rloop_mcore.rollout.served import ServedModel
from rloop_mcore.rollout.sync import WeightSync
from rloop_mcore.rollout.together import together
from rloop_mcore.types import Completion, SampleRequest, Sampling

if TYPE_CHECKING:
    from rloop_mcore.protocols import NamedTensors

T = TypeVar("T")
log = logging.getLogger(__name__)

_SYNC_ATTEMPTS = 3
_POLL_S = 0.1
_DISCONNECT_S = 30.0  # to leave the group of the weight broadcast, which NCCL may not let go


class Fleet:
    """`protocols.Rollout` over servers that are running or starting.

    Its event loop runs on a thread of its own, so that engines generate while the caller trains. What iterates over
    weights (`sync`, `wait`) does so on the calling thread, which must be the actor's.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        channel: WeightChannel | None,
        *,
        model: ServedModel,
        bucket_mib: int,
        start_timeout_s: float,
        request_timeout_s: float,
        backend: str = "gloo",
        deterministic: bool = True,
        max_running: int = 256,
        partial: bool = False,
        probe: Probe | None = None,
    ) -> None:
        """channel: None where the engines take the weights from this process's memory, as those of one host can.
        backend: of the channel, gloo or nccl; start_timeout_s: also for a sync's group, and a bucket.

        deterministic: a batch is cut into as many calls as there are engines, whatever becomes of these, and an engine
        has one call at a time; else a call a group, with about `max_running` samples at an engine at once at most.
        partial: calls may be under way when `sync` is called, which not every version of SGLang can.
        """
        self.servers = list(servers)
        self.version: int | None = None
        self._shares = len(self.servers) if deterministic else 0
        self._export: Callable[[], NamedTensors] | None = None
        self._folder: Path | None = None  # of adopted weights
        self._started_with: dict[Engine, str] = {}  # what engines call it
        self._sync = WeightSync(channel, backend, start_timeout_s, bucket_mib * 2**20, model)
        self._news: Future[None] = Future()  # resolved when an engine waits for weights, or is given up
        self._controller = Controller(
            self.servers,
            lambda url, key: EngineClient(url, key, model.vocabulary, request_timeout_s, partial),
            limit=0 if deterministic else max_running,  # 0: an engine has one call at a time, whole
            start_timeout_s=start_timeout_s,
            probe=probe or Probe(),
            on_waiting=self._announce,
        )
        self._generating: set[Future[list[Completion]]] = set()
        self._started = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="engines", daemon=True)
        self._thread.start()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_ready(self) -> None:
        """Wait until every server answers (`sync` does it too). Raises EngineError with the server's log."""
        if not self._started:
            self._submit(self._controller.start()).result()
            self._started = True

    def sync(self, export: Callable[[], NamedTensors], version: int) -> dict[str, float]:
        """Bring every engine to the weights of `export`, stamped `version`, verified by checksums.

        `export` gives the weights anew each time it is called; they are iterated on this thread. An engine that fails
        is left to its restart, and the others are synced. What is being generated, or submitted meanwhile, waits, and
        goes on under the new weights. Returns seconds_sync, seconds_verify, sync_bytes, sync_buckets and the engines'
        failures so far. Raises EngineError; no engine then serves until a sync succeeds.
        """
        self.wait_ready()
        try:
            metrics = self._persist(self._answering, lambda clients: self._bring(clients, export, version))
        except BaseException:
            self.version = None
            raise
        self.version, self._export = version, export
        counters = self._controller.counters
        return metrics | {
            "engines_serving": float(len(self._controller.in_state("serving"))),
            "engines_lost": float(counters.lost),
            "engine_retries": float(counters.retries),
        }

    def sleep(self) -> None:
        """Have the engines give up their memory until the next sync. Nothing may be under way; an engine that fails is
        left to its restart."""
        self.wait_ready()
        self.version = None
        self._submit(self._controller.sleep()).result()

    def adopt_weights(self, folder: Path) -> None:
        """Take what the engines were started with, the model in `folder`, as version 0: an evaluation trains nothing.

        Raises UserError for an engine that a run has brought other weights; `wait` does where that happens later, or
        where an engine comes back with another model.
        """
        self.wait_ready()
        self._adopt({engine: _client(engine) for engine in self._controller.in_state("waiting")}, folder)
        self._folder = folder
        self.version = ADOPTED

    def submit(
        self,
        requests: Sequence[SampleRequest],
        sampling: Sampling,
        enough: int | None = None,
        answered: Answered | None = None,
    ) -> Future[list[Completion]]:
        """Start to generate one completion a request, in order (see `Controller.generate`)."""
        if self.version is None:
            raise EngineError("the engines hold no synced weights; sync before generating")
        future = self._submit(self._controller.generate(requests, sampling, self._shares, enough, answered))
        self._generating.add(future)
        future.add_done_callback(self._generating.discard)
        return future

    def wait(self, future: Future[T], version: int | None = None) -> T:
        """The result of `future`, which engines work on. Engines that were restarted meanwhile get their weights here.

        version: of the weights that the last sync's `export` gives now, where it is not the version then.
        """
        while not future.done():
            pending: list[Future[Any]] = [future, self._news]
            wait(pending, return_when=FIRST_COMPLETED)
            if self._news.done() and not future.done():
                self._news = Future()
                self._catch_up(self.version if version is None else version)
        return future.result()

    def generate(
        self, requests: Sequence[SampleRequest], sampling: Sampling, answered: Answered | None = None
    ) -> list[Completion]:
        """One completion a request, in order, by the weights of the last sync. Raises EngineError."""
        return self.wait(self.submit(requests, sampling, answered=answered)) if requests else []

    def cancel(self) -> None:
        """Give up everything that was submitted; its futures are cancelled."""
        for future in list(self._generating):
            future.cancel()

    def close(self) -> None:
        """Leave the broadcast group, close connections, stop the servers of this run. May be called twice."""
        if self._loop.is_closed():
            return
        self.cancel()
        try:
            self._submit(self._disconnect()).result()
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            stop_all(self.servers)

    # -- weights --------------------------------------------------------------------------------------------------

    def _bring(
        self, clients: dict[Engine, EngineClient], export: Callable[[], NamedTensors], version: int
    ) -> dict[str, float]:
        self._on_loop(self._controller.expect, version)
        metrics = self._sync.run(list(clients.values()), export(), version, self._submit)
        self._submit(self._promote(clients, version)).result()
        return metrics

    def _adopt(self, clients: dict[Engine, EngineClient], folder: Path) -> None:
        async def adopt(engine: Engine, client: EngineClient) -> None:
            now = await client.check_untouched(folder)
            if now != (before := self._started_with.setdefault(engine, now)):
                text = f"{client.url} was started anew with {now}, and had {before} before: evaluate anew."
                raise UserError(f"rollout.endpoints: {text}")
            await client.set_weight_version(str(ADOPTED))
            await client.resume()  # somebody may have left it paused

        self._submit(together(*(adopt(engine, client) for engine, client in clients.items()))).result()
        self._submit(self._promote(clients, ADOPTED)).result()

    def _catch_up(self, version: int | None) -> None:
        """Bring engines that came back to the current weights, while the others go on generating."""
        if version is None:
            return

        def waiting(failed: set[Engine]) -> list[Engine]:
            return [engine for engine in self._controller.in_state("waiting") if engine not in failed]

        def bring(clients: dict[Engine, EngineClient]) -> None:
            if not clients:
                return
            if self._export is not None:
                self._bring(clients, self._export, version)
            elif self._folder is not None:  # which a server started anew holds again
                self._adopt(clients, self._folder)

        try:
            self._persist(waiting, bring)
        except (EngineError, TimeoutError) as error:
            named = getattr(error, "engine", None)
            for engine in self._controller.in_state("waiting"):
                if named in (None, _client(engine).url):  # the others are brought when it is back, or by the next sync
                    self._on_loop(self._controller.lose, engine, str(error))

    def _persist(
        self, pick: Callable[[set[Engine]], list[Engine]], work: Callable[[dict[Engine, EngineClient]], T]
    ) -> T:
        """`work` with the engines that `pick` gives, told those that failed; anew where some did, without them.

        An attempt that an engine spoils by dying for the first time is not counted: nodes may go one after the other.
        A refusal (400) ends it at once only when it comes again and every engine lives: SGLang answers so to whatever
        goes wrong with weights, a broadcast that broke since another engine died among it.
        """
        failed: set[Engine] = set()
        attempts, refusal = 0, ""
        while True:
            clients = {engine: _client(engine) for engine in pick(failed)}
            try:
                return work(clients)
            except (EngineError, TimeoutError) as error:
                died = self._died(clients)
                lost = died | self._lose_named(clients, error, died)
                if not died - failed:
                    attempts += 1
                if attempts == _SYNC_ATTEMPTS or (not lost and str(error) == refusal):
                    raise
                failed |= lost
                refusal = str(error) if _is_refusal(error) else ""
                log.warning("the weights are sent again: %s", error)

    def _answering(self, failed: set[Engine]) -> list[Engine]:
        """The engines a sync can reach, those that failed in it only where there is no other; waits for one to come
        back where there is none. Raises EngineError."""
        while True:
            engines = self._controller.in_state("waiting", "serving")
            if engines:
                return [engine for engine in engines if engine not in failed] or engines
            if not self._controller.in_state("lost", "starting"):
                raise EngineError(f"no engine is left; the last failed so: {self._controller.counters.reasons[-1]}")
            wait([self._news], timeout=_POLL_S)
            if self._news.done():
                self._news = Future()

    def _died(self, clients: dict[Engine, EngineClient]) -> set[Engine]:
        """Fence the engines that don't answer; returns all that were lost meanwhile."""
        self._submit(self._controller.check_health()).result()
        return {e for e, client in clients.items() if e.state in ("lost", "dead") or e.client is not client}

    def _lose_named(self, clients: dict[Engine, EngineClient], error: Exception, died: set[Engine]) -> set[Engine]:
        """Fence the engine that `error` names; returns it.

        One that answered with an error is spared where another died: a broadcast fails for all its members. One that
        refuses (400) is spared always: it may be right, these are no weights for it.
        """
        if _is_refusal(error) or (died and getattr(error, "status", None) is not None):
            return set()
        named = {e for e, c in clients.items() if e not in died and c.url == getattr(error, "engine", None)}
        for engine in named:
            self._on_loop(self._controller.lose, engine, str(error))
        return named

    async def _promote(self, clients: dict[Engine, EngineClient], version: int) -> None:
        """Have these serve, but for one that was lost since and is back: it has another client, and other weights."""
        self._controller.promote([engine for engine, client in clients.items() if engine.client is client], version)

    # -- the event loop's thread ----------------------------------------------------------------------------------

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _on_loop(self, method: Callable[..., None], *arguments: Any) -> None:
        async def tell() -> None:
            method(*arguments)

        self._submit(tell()).result()

    def _announce(self) -> None:
        if not self._news.done():
            self._news.set_result(None)

    async def _disconnect(self) -> None:
        try:
            await asyncio.wait_for(self._sync.close(), _DISCONNECT_S)
        except TimeoutError:
            log.warning("the weight channel was not left within %g s", _DISCONNECT_S)
        finally:
            await self._controller.close()


def _is_refusal(error: Exception) -> bool:
    return getattr(error, "status", None) == 400


def _client(engine: Engine) -> EngineClient:
    assert engine.client is not None
    return engine.client
