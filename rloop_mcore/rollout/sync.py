"""The weight sync on all engines at once: pause, unstamp, flush, begin, broadcast the buckets, end, verify, stamp,
continue."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from rloop_mcore.protocols import WeightChannel
from rloop_mcore.rollout.buckets import Bucket, Buffers
from rloop_mcore.rollout.checksums import ExpectedChecksums, KeptWeights, difference
from rloop_mcore.rollout.client import UNFINISHED, EngineClient, EngineError, GroupSpec
from rloop_mcore.rollout.fp8 import quantized
from rloop_mcore.rollout.handles import handles_of
from rloop_mcore.rollout.served import ServedModel, kept_dtype, kept_weights
from rloop_mcore.rollout.together import together

if TYPE_CHECKING:
    from rloop_mcore.protocols import NamedTensors

T = TypeVar("T")
_BEYOND_DEADLINE_S = 30.0  # of a broadcast that has failed, to leave its group
Submit = Callable[[Coroutine[Any, Any, T]], "Future[T]"]  # runs a coroutine on the event loop's thread


class WeightSync:
    """Keeps the broadcast group between syncs; a failed sync gives it up and leaves the engines paused."""

    def __init__(
        self, channel: WeightChannel | None, backend: str, timeout_s: float, bucket_bytes: int, model: ServedModel
    ) -> None:
        """channel: None where the engines take the weights from this process's memory (`handles.py`); backend: of the
        channel, gloo or nccl; timeout_s: for joining the group, and for one bucket."""
        self.channel, self.backend, self.timeout_s, self.model = channel, backend, timeout_s, model
        self.buffers = Buffers(bucket_bytes, host=channel is not None and backend == "gloo", shared=channel is None)
        self._members: list[EngineClient] = []  # of the group, in the order of their ranks
        self._closing: asyncio.Future[None] | None = None  # of the channel, the last one
        self._sessions = False
        self._kept: list[KeptWeights] = []  # how each member keeps its weights
        self._dtype = torch.float32

    def run(
        self, clients: Sequence[EngineClient], weights: NamedTensors, version: int, submit: Submit[Any]
    ) -> dict[str, float]:
        """Bring `clients` to `weights`, stamped `version`. `weights` is iterated on this thread, to its end always.

        While one bucket is broadcast the next one is gathered: two buckets of memory. Returns seconds_sync,
        seconds_verify, sync_bytes and sync_buckets. Raises EngineError (or what the channel or `weights` raises); the
        engines then stay paused, so that none serves a mixture.
        """
        begun, sent, count = time.monotonic(), 0, 0
        sending: Future[None] | None = None
        try:
            submit(self._open(list(clients))).result()
            expected = {kept: ExpectedChecksums(kept) for kept in self._kept}
            stream = quantized(weights) if self.model.fp8 else weights
            for bucket in self.buffers.fill(stream, self._dtype, expected.values()):
                if sending is not None:
                    sending.result()
                sending = submit(self._send(bucket))
                sent, count = sent + bucket.data.numel(), count + 1
            if sending is not None:
                sending.result()
            verify_s = submit(self._finish(version, expected)).result()
        except BaseException:
            self._members = []
            if sending is not None:
                sending.cancel()
            submit(self._close_channel())  # engines that wait in a broadcast are freed by it
            raise
        finally:
            self.buffers.release()
            for _ in weights:  # the other ranks go through the whole export; rank 0 must too
                pass
        seconds = time.monotonic() - begun
        return {
            "seconds_sync": seconds,
            "seconds_verify": verify_s,
            "sync_bytes": float(sent),
            "sync_buckets": float(count),
        }

    async def close(self) -> None:
        """Leave the group on both ends; an engine that is gone already is no error."""
        members, self._members = self._members, []
        if self.channel is not None:
            name = self.channel.group_name
            await asyncio.gather(*(c.leave_group(name) for c in members), return_exceptions=True)
        await self._close_channel()

    async def _close_channel(self) -> None:
        """In a thread: it waits for a broadcast under way, until that fails or its deadline is over.

        Raises TimeoutError where NCCL does not let the group go then; whoever comes later waits for the same closing.
        """
        if self.channel is None:
            return
        if self._closing is None or self._closing.done():
            self._closing = _in_thread(self.channel.close)
        limit_s = self.timeout_s + _BEYOND_DEADLINE_S
        done, _ = await asyncio.wait({self._closing}, timeout=limit_s)
        if not done:
            raise TimeoutError(f"the group of the last weight broadcast was not left within {limit_s:g} s")
        self._closing.result()

    async def _open(self, clients: list[EngineClient]) -> None:
        if clients != self._members:
            self._sessions = await _agree(clients)
        # Before 0.5.21, as before sessions, a paused server with retracted calls would not flush its cache. None of the
        # run's are under way then (`versions.check_partial`), at most a health probe is.
        mode = "retract" if self._sessions else "abort"
        await _each(clients, lambda c: c.pause(mode))
        await _each(clients, lambda c: c.set_weight_version(UNFINISHED))  # should this process die meanwhile
        await _each(clients, lambda c: c.flush_cache())
        await _each(clients, lambda c: c.wake("weights"))
        if clients != self._members:
            await self._connect(clients)
        if self._sessions:
            await _each(clients, _begin)

    async def _connect(self, clients: list[EngineClient]) -> None:
        if self._members:
            await self.close()
        infos = await together(*(c.server_info() for c in clients))
        self._kept = [kept_weights(info, self.model, c.url) for info, c in zip(infos, clients, strict=True)]
        dtypes = {kept_dtype(info, self.model, c.url) for info, c in zip(infos, clients, strict=True)}
        if len(dtypes) > 1:
            raise EngineError(f"the engines differ in dtype ({', '.join(sorted(map(str, dtypes)))}): start them alike")
        self._dtype = dtypes.pop()
        if self.channel is not None:
            await self._join(clients, self.channel)
        self._members = clients

    async def _join(self, clients: list[EngineClient], channel: WeightChannel) -> None:
        """Make the broadcast group of this process and the engines' ranks."""
        await self._close_channel()
        await together(*(_leave_old_group(client, channel.group_name) for client in clients))
        ranks = [kept.tp for kept in self._kept]
        world_size = 1 + sum(ranks)
        address, port = channel.open(world_size)
        offsets = [1 + sum(ranks[:i]) for i in range(len(ranks))]
        await together(
            _in_thread(channel.join),
            *(
                client.join_group(
                    GroupSpec(address, port, offset, world_size, channel.group_name, self.backend), self.timeout_s
                )
                for client, offset in zip(clients, offsets, strict=True)
            ),
        )

    async def _send(self, bucket: Bucket) -> None:
        channel = self.channel
        if channel is None:
            pairs = zip(self._members, self._kept, strict=True)
            handles = [(client, [handles_of(bucket.tensors) for _ in range(kept.tp)]) for client, kept in pairs]
            await together(*(client.update_from_tensors(h, self.timeout_s) for client, h in handles))
            return
        await together(
            *(c.update_from_distributed(bucket.tensors, channel.group_name, self.timeout_s) for c in self._members),
            _in_thread(lambda: channel.send([bucket.data])),
        )

    async def _finish(self, version: int, expected: dict[KeptWeights, ExpectedChecksums]) -> float:
        """Returns the seconds the engines' checksums took."""
        if self._sessions:
            await _each(self._members, lambda c: c.end_update())
        begun = time.monotonic()
        by_rank = {kept: checksums.by_rank() for kept, checksums in expected.items()}
        pairs = zip(self._members, self._kept, strict=True)
        await together(*(_verify(client, by_rank[kept], self.timeout_s) for client, kept in pairs))
        seconds = time.monotonic() - begun
        await _each(self._members, lambda c: _stamp(c, version))
        await _each(self._members, lambda c: c.wake("kv_cache"))
        await _each(self._members, lambda c: c.resume())
        return seconds


async def _each(clients: Sequence[EngineClient], call: Callable[[EngineClient], Awaitable[None]]) -> None:
    await together(*(call(client) for client in clients))


async def _leave_old_group(client: EngineClient, group_name: str) -> None:
    """An engine may still be in the group of a failed sync, or of a run that was killed."""
    try:
        await client.leave_group(group_name)
    except EngineError as error:
        if error.status is None:
            raise


async def _agree(clients: Sequence[EngineClient]) -> bool:
    answers = await together(*(c.has_update_sessions() for c in clients))
    if len(set(answers)) > 1:
        raise EngineError("engines from before and after SGLang 0.5.21 cannot be synced together")
    return answers[0]


async def _begin(client: EngineClient) -> None:
    """Begin an update; one that an earlier, failed sync left open is closed first."""
    try:
        await client.begin_update()
    except EngineError as error:
        if error.status != 400:
            raise
        try:
            await client.end_update()
        except EngineError as incomplete:  # it says what the failed sync left; the coming one writes everything
            if incomplete.status != 400:
                raise
        await client.begin_update()


async def _verify(client: EngineClient, expected: list[dict[str, str]], timeout_s: float) -> None:
    """Raises EngineError, naming a tensor, where a rank of the engine does not hold what was sent."""
    answers = await client.checksums(timeout_s)
    ranks = sorted({tp_rank for tp_rank, _ in answers})
    if ranks != list(range(len(expected))):
        text = f"{client.url}: checksums are of ranks {ranks}, the engine has {len(expected)}"
        raise EngineError(text, engine=client.url)
    for tp_rank, found in answers:
        wrong = difference(expected[tp_rank], found)
        if wrong is not None:
            raise EngineError(
                f"{client.url}: rank {tp_rank} does not hold the weights it was sent: {wrong}", engine=client.url
            )


async def _stamp(client: EngineClient, version: int) -> None:
    stamp = client.stamp(version)
    await client.set_weight_version(stamp)
    found = await client.weight_version()
    if found != stamp:
        raise EngineError(f"{client.url}: holds weight version {found} after a sync to {stamp}", engine=client.url)


def _in_thread(function: Callable[[], None]) -> asyncio.Future[None]:
    """Run a blocking call in a daemon thread: one that is stuck must not keep the process from ending."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if not result.done():
            result.set_result(None) if error is None else result.set_exception(error)

    def run() -> None:
        error: BaseException | None = None
        try:
            function()
        except BaseException as raised:
            error = raised
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=run, daemon=True).start()
    return result
