"""A Megatron checkpoint on its way to disk, while training goes on."""

from __future__ import annotations

import inspect
import os
import queue
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel

from rloop_mcore.actor.checkpoint import state_of
from rloop_mcore.actor.optimizer import PolicyOptimizer
from rloop_mcore.errors import DiskFull, Fault
from rloop_mcore.platform.files import is_disk_full, new_directory
from rloop_mcore.platform.manifest import crc32_of, write_manifest

# Megatron 0.19's default writer needs nvidia_resiliency_ext; 0.16 has only this one, and no argument to ask for it.
_OWN_WRITER = (
    {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters else {}
)
_RESERVE = ".reserve"
_RESERVED = 4 * 2**20  # bytes


def _reserve(path: Path) -> None:
    """Keep space for the small files that Megatron has rank 0 write while the others wait for it: where there is none,
    they would wait in vain. As much again is sure to be there now. Raises OSError."""
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 2 * _RESERVED)
        file.truncate(_RESERVED)


class PendingSave:
    """A checkpoint on its way to disk: its tensors are copied to host memory, a thread writes this rank's file.

    A thread, where Megatron would fork: it shares nothing with training but the cores, and dies with the run.
    """

    def __init__(self, path: Path, chunks: list[DistributedDataParallel], optimizer: PolicyOptimizer) -> None:
        """Collective: take the checkpoint of this moment. Training may go on when this returns."""
        self._path = path
        # Megatron's default starts a manager process for this queue; our writer is in the same process.
        filesystem_async._results_queue = queue.Queue()
        failure = None
        with ExitStack() as stack:
            self._folder: Path | None = None
            try:
                if dist.get_rank() == 0:
                    self._folder = stack.enter_context(new_directory(path))
                    _reserve(self._folder / _RESERVE)
            except OSError as error:
                failure = error
            self._agree(failure)
            target = [str(self._folder)]
            dist.broadcast_object_list(target, src=0)
            self._request = dist_checkpointing.save(
                state_of(chunks, optimizer),
                target[0],
                sharded_strategy=TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1),
                validate_access_integrity=False,
                async_sharded_save=True,
                **_OWN_WRITER,
            )
            self._directory = stack.pop_all()
        self._written: Future[dict[str, int]] = Future()  # its files and their checksums
        if self._request.async_fn is None:  # other ranks hold all that this one does
            self._written.set_result({})
            return
        buckets = self._request.async_fn_args[1]
        buckets[:] = [_copied(bucket) for bucket in buckets]
        Thread(target=_write, args=(self._request, self._written), name="checkpoint", daemon=True).start()

    def finish(self, timeout_s: float) -> None:
        """Collective: the directory is at its path, whole and durable, when this returns.

        Raises Fault where a rank's file was not written, or not in `timeout_s` seconds (DiskFull where space was
        lacking): there is no checkpoint then.
        """
        failure = None
        try:
            with self._directory:
                self._agree(self._failure(timeout_s))
                written: list[dict[str, int]] = [{}] * dist.get_world_size()
                dist.all_gather_object(written, self._written.result())
                if self._folder is not None:
                    (self._folder / _RESERVE).unlink()
                for finalize in self._request.finalize_fns:
                    finalize()
                if self._folder is not None:
                    write_manifest(self._folder, {name: crc for files in written for name, crc in files.items()})
        except OSError as error:
            failure = error
        self._agree(failure)

    def _failure(self, timeout_s: float) -> BaseException | None:
        try:
            return self._written.exception(timeout_s)
        except TimeoutError:
            return Fault(f"its file took more than {timeout_s:.0f} s")

    def _agree(self, failure: BaseException | None) -> None:
        """Raise Fault on every rank where one has failed; DiskFull where only space was lacking."""
        text = f"{failure}" if isinstance(failure, Fault) else f"{type(failure).__name__}: {failure}"
        mine = None if failure is None else (text, is_disk_full(failure))
        outcomes: list[tuple[str, bool] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, mine)
        failed = {rank: outcome for rank, outcome in enumerate(outcomes) if outcome is not None}
        if failed:
            kind = DiskFull if all(full for _, full in failed.values()) else Fault
            reasons = "; ".join(f"rank {rank}: {text}" for rank, (text, _) in failed.items())
            raise kind(f"the checkpoint {self._path} was not written: {reasons}")


def _copied(bucket: tuple[str, str, tuple[list[Any], list[Any]]]) -> tuple[str, str, tuple[list[Any], list[Any]]]:
    """A file's contents with its tensors in host memory of their own; the bytes are Megatron's copies already."""
    file, key, (texts, tensors) = bucket
    return file, key, (texts, [(item, tensor.to("cpu", copy=True)) for item, tensor in tensors])


def _write(request: Any, written: Future[dict[str, int]]) -> None:
    """Write and fsync this rank's file; hand Megatron the result, and `written` its name and checksum."""
    outcomes: queue.Queue[tuple[int, Any]] = queue.Queue()
    running: queue.Queue[int] = queue.Queue()
    running.put(0)
    try:
        transforms, (_, (bucket,), results) = request.async_fn.args[0], request.async_fn_args
        writer = filesystem_async.FileSystemWriterAsync
        writer.write_preloaded_data(transforms, 0, bucket, outcomes, running, use_fsync=True)
        index, outcome = outcomes.get_nowait()
        if isinstance(outcome, Exception):
            raise outcome
        results.put({index: outcome})
        file = Path(bucket[0])
        checksums = {file.name: crc32_of(file)}
    except BaseException as error:
        written.set_exception(error)
    else:
        written.set_result(checksums)
