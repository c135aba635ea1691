"""All engines behind `protocols.Rollout`: which engine gets what, and whether what comes back can be trusted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from itertools import groupby
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from rloop_mcore.protocols import WeightChannel
from rloop_mcore.rollout.client import EngineClient, EngineError
from rloop_mcore.rollout.launch import EmbeddedServer, RunningServer
from rloop_mcore.rollout.sync import WeightSync
from rloop_mcore.rollout.together import together
from rloop_mcore.types import Completion, SampleRequest, Sampling

if TYPE_CHECKING:
    from rloop_mcore.protocols import NamedTensors

T = TypeVar("T")


class Fleet:
    """`protocols.Rollout` over servers that are running or starting.

    Synchronous: an event loop of its own runs on the caller's thread, and only during a call.
    """

    def __init__(
        self,
        servers: Sequence[EmbeddedServer | RunningServer],
        channel: WeightChannel,
        *,
        vocabulary: int,
        bucket_mib: int,
        start_timeout_s: float,
        request_timeout_s: float,
        backend: str = "gloo",
    ) -> None:
        """vocabulary: ids below it are valid; backend: of the weight broadcast, gloo or nccl."""
        self.servers, self.channel, self.backend = list(servers), channel, backend
        self.vocabulary, self.bucket_bytes = vocabulary, bucket_mib * 2**20
        self.start_timeout_s, self.request_timeout_s = start_timeout_s, request_timeout_s
        self.clients: list[EngineClient] = []
        self.version: int | None = None
        self._sync: WeightSync | None = None
        self._loop = asyncio.new_event_loop()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait_ready(self) -> None:
        """Wait until every server answers (`sync` does it too). Raises EngineError with the server's log."""
        if not self.clients:
            self._run(self._connect())

    def sync(self, weights: NamedTensors, version: int) -> dict[str, float]:
        """Bring every engine to `weights`, stamped `version`. Returns seconds_sync, sync_bytes, sync_buckets.

        `weights` is iterated on the calling thread. Raises EngineError; the engines then stay paused.
        """
        self.wait_ready()
        assert self._sync is not None
        self.version = None
        metrics = self._run(self._sync.run(weights, version, self.bucket_bytes))
        self.version = version
        return metrics

    def adopt_weights(self) -> None:
        """Take what the engines were started with as version 0: an evaluation trains nothing."""
        self.wait_ready()
        self._run(together(*(client.set_weight_version("0") for client in self.clients)))
        self.version = 0

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling) -> list[Completion]:
        """One completion a request, in order, all by the weights of the last sync. Raises EngineError.

        Consecutive requests with one prompt are a group and go to one engine, group k to engine k mod E in a single
        call: which engine draws which sample, beside which others, depends on nothing but the requests.
        """
        if not requests:
            return []
        if self.version is None:
            raise EngineError("the engines hold no synced weights; sync before generating")
        shares: list[list[int]] = [[] for _ in self.clients]
        groups = groupby(range(len(requests)), key=lambda i: requests[i].prompt_ids)
        for number, (_, members) in enumerate(groups):
            shares[number % len(shares)] += members
        calls = [
            client.generate([requests[i] for i in share], sampling)
            for client, share in zip(self.clients, shares, strict=True)
            if share
        ]
        answers = self._run(together(*calls))
        completions: dict[int, Completion] = {}
        for share, answer in zip([s for s in shares if s], answers, strict=True):
            for i, completion in zip(share, answer, strict=True):
                self._check(completion, sampling)
                completions[i] = completion
        return [completions[i] for i in range(len(requests))]

    def close(self) -> None:
        """Leave the broadcast group, close connections, stop the servers of this run. May be called twice."""
        if self._loop.is_closed():
            return
        try:
            self._loop.run_until_complete(self._disconnect())
        finally:
            self._loop.close()
            for server in self.servers:
                server.stop()

    def _check(self, completion: Completion, sampling: Sampling) -> None:
        if completion.weight_version != self.version:
            raise EngineError(f"a sample has weight version {completion.weight_version}, synced was {self.version}")
        if completion.finish_reason not in ("stop", "length"):
            raise EngineError(f"a sample ended with finish reason {completion.finish_reason!r}")
        if not 1 <= len(completion.response_ids) <= sampling.max_tokens:
            raise EngineError(
                f"a sample has {len(completion.response_ids)} tokens, 1..{sampling.max_tokens} were asked"
            )

    def _run(self, work: Awaitable[T]) -> T:
        """Run `work`; a failure is told together with how a server process ended, if one did."""
        try:
            return self._loop.run_until_complete(work)
        except EngineError as error:
            ended = [text for text in (server.failure() for server in self.servers) if text is not None]
            if not ended or str(error) in ended:
                raise
            raise EngineError("\n".join([str(error), *ended]), error.status) from error

    async def _connect(self) -> None:
        addresses = await together(*(server.ready(self.start_timeout_s) for server in self.servers))
        clients = [EngineClient(url, key, self.vocabulary, self.request_timeout_s) for url, key in addresses]
        try:
            await together(*(client.server_info() for client in clients))  # answers, and the key is right
        except BaseException:
            await asyncio.gather(*(client.close() for client in clients))
            raise
        self.clients = clients
        self._sync = WeightSync(clients, self.channel, self.backend, self.request_timeout_s)

    async def _disconnect(self) -> None:
        if self._sync is not None:
            await self._sync.close()
        await asyncio.gather(*(client.close() for client in self.clients))
