"""The weight sync: pause, flush, begin, broadcast the buckets, end, stamp, check, continue, on all engines at once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from math import ceil

import torch

from rloop_mcore.protocols import WeightChannel
from rloop_mcore.rollout.client import EngineClient, EngineError, GroupSpec, TensorSpec
from rloop_mcore.rollout.together import together

Bucket = list[tuple[str, torch.Tensor]]


class WeightSync:
    """Keeps the broadcast group between syncs; a failed sync gives it up and leaves the engines paused."""

    def __init__(self, clients: Sequence[EngineClient], channel: WeightChannel, backend: str, timeout_s: float) -> None:
        """backend: gloo or nccl; timeout_s: for joining the group and for one bucket."""
        self.clients, self.channel, self.backend, self.timeout_s = clients, channel, backend, timeout_s
        self.connected = False
        self.sessions = False

    async def run(
        self, weights: Iterator[tuple[str, torch.Tensor]], version: int, bucket_bytes: int
    ) -> dict[str, float]:
        """Bring all engines to `weights`, stamped `version`. Returns seconds, bytes and buckets.

        Raises EngineError (or what the channel raises); the engines then stay paused, so that none serves a mixture.
        """
        begun, sent, count = time.monotonic(), 0, 0
        try:
            await self._all(lambda c: c.pause("retract"))
            await self._all(lambda c: c.flush_cache())
            if not self.connected:
                await self._connect()
            if self.sessions:
                await self._all(_begin)
            for bucket in buckets(weights, bucket_bytes):
                sent += await self._send(bucket)
                count += 1
            if self.sessions:
                await self._all(lambda c: c.end_update())
            await self._all(lambda c: c.set_weight_version(str(version)))
            await self._all(lambda c: _check_version(c, version))
            await self._all(lambda c: c.resume())
        except BaseException:
            self.connected = False
            raise
        return {"seconds_sync": time.monotonic() - begun, "sync_bytes": float(sent), "sync_buckets": float(count)}

    async def close(self) -> None:
        """Leave the group on both ends; an engine that is gone already is no error."""
        if self.connected:
            self.connected = False
            await asyncio.gather(
                *(c.leave_group(self.channel.group_name) for c in self.clients), return_exceptions=True
            )
        self.channel.close()

    async def _all(self, call: Callable[[EngineClient], Awaitable[None]]) -> None:
        await together(*(call(client) for client in self.clients))

    async def _connect(self) -> None:
        self.channel.close()
        await self._all(self._leave_old_group)
        ranks = await together(*(c.ranks() for c in self.clients))
        self.sessions = await _agree(self.clients)
        world_size = 1 + sum(ranks)
        address, port = self.channel.open(world_size)
        offsets = [1 + sum(ranks[:i]) for i in range(len(ranks))]
        await together(
            _in_thread(self.channel.join),
            *(
                client.join_group(
                    GroupSpec(address, port, offset, world_size, self.channel.group_name, self.backend), self.timeout_s
                )
                for client, offset in zip(self.clients, offsets, strict=True)
            ),
        )
        self.connected = True

    async def _leave_old_group(self, client: EngineClient) -> None:
        """An engine may still be in the group of a failed sync, or of a run that was killed."""
        try:
            await client.leave_group(self.channel.group_name)
        except EngineError as error:
            if error.status is None:
                raise

    async def _send(self, bucket: Bucket) -> int:
        flat = flatten(bucket)
        specs = [TensorSpec(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in bucket]
        await together(
            *(c.update_from_distributed(specs, self.channel.group_name, self.timeout_s) for c in self.clients),
            _in_thread(lambda: self.channel.send([flat])),
        )
        return flat.numel()


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


async def _check_version(client: EngineClient, version: int) -> None:
    found = await client.weight_version()
    if found != str(version):
        raise EngineError(f"{client.url}: holds weight version {found} after a sync to {version}")


async def _in_thread(function: Callable[[], None]) -> None:
    """Run a blocking call in a daemon thread: one that is stuck must not keep the process from ending."""
    loop, result = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

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
    await result


def buckets(weights: Iterator[tuple[str, torch.Tensor]], bucket_bytes: int) -> Iterator[Bucket]:
    """Cut a stream of tensors into runs of at most `bucket_bytes`; a larger tensor is a bucket of its own."""
    bucket: Bucket = []
    size = 0
    for name, tensor in weights:
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


def flatten(bucket: Bucket) -> torch.Tensor:
    """uint8 [bytes]: the tensors one behind the other, each at the next multiple of its item size."""
    starts, end = [], 0
    for _, tensor in bucket:
        start = ceil(end / tensor.itemsize) * tensor.itemsize
        starts.append(start)
        end = start + tensor.nbytes
    flat = torch.zeros(end, dtype=torch.uint8, device=bucket[0][1].device)
    for start, (_, tensor) in zip(starts, bucket, strict=True):
        flat[start : start + tensor.nbytes] = tensor.detach().contiguous().view(-1).view(torch.uint8)
    return flat
