"""The trainer's end of the weight broadcast: rank 0 of a process group whose other ranks are the engines'."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from rloop_mcore.platform.process_group import host_store, join_group, leave_group

_LAST_COME_S = 2.0


class BroadcastChannel:
    """Implements `protocols.WeightChannel` over torch.distributed.

    backend: nccl, for tensors on a GPU, or gloo, through host memory. `address` is where engines reach this
    process. Engines are asked to join as ranks 1 .. world_size - 1 of `group_name`; SGLang's
    /init_weights_update_group and `platform.process_group.join_group` do it alike.
    """

    def __init__(self, backend: str, group_name: str, timeout_s: float, address: str = "127.0.0.1") -> None:
        self.backend = backend
        self.group_name = group_name
        self.timeout_s = timeout_s
        self.address = address
        self._store: dist.TCPStore | None = None
        self._world_size = 0
        self._group: dist.ProcessGroup | None = None

    def open(self, world_size: int) -> tuple[str, int]:
        """Start the rendezvous for `world_size` ranks, this one included; returns (address, port)."""
        self.close()
        self._store = host_store(self.address, self.timeout_s)
        self._world_size = world_size
        return self.address, self._store.port

    def join(self) -> None:
        """Join as rank 0; blocks until every engine rank has joined. Raises TimeoutError after `timeout_s` seconds."""
        if self._store is None:
            raise RuntimeError("the weight channel is not open: call open() first")
        self._group = join_group(
            self.backend, self.address, self._store.port, self._world_size, 0, self.group_name, self.timeout_s
        )

    def send(self, tensors: Sequence[torch.Tensor]) -> None:
        """Broadcast the tensors in order, one broadcast a tensor; returns when all have been sent.

        Raises TimeoutError when an engine takes none for `timeout_s` seconds; the group is of no use then.
        """
        if self._group is None:
            raise RuntimeError("the weight channel has not joined its group: call join() first")
        done = 0
        try:
            sent = [tensor.detach().contiguous() for tensor in tensors]
            if self.backend == "gloo":
                sent = [tensor.cpu() for tensor in sent]
            works = [dist.broadcast(tensor, src=0, group=self._group, async_op=True) for tensor in sent]
            for work in works:
                assert work is not None  # async_op gives one to every member
                work.wait(timedelta(seconds=self.timeout_s))
                done += 1
        except (dist.DistError, RuntimeError) as error:
            raise TimeoutError(
                f"weight broadcast {done + 1} of {len(tensors)} to the {self._world_size - 1} engine ranks of "
                f"{self.group_name!r} did not finish within {self.timeout_s:g} s: {error}"
            ) from error

    def close(self) -> None:
        """Leave the group and stop the rendezvous; a channel that is closed can be opened again.

        A rendezvous that not all have come to is open for two seconds more. An engine that finds it closed knocks until
        its own deadline, deaf to all else; one that is in when it closes learns of it.
        """
        if self._store is not None and self._group is None:
            time.sleep(_LAST_COME_S)
        if self._group is not None:
            leave_group(self._group)
        self._group = None
        self._store = None
