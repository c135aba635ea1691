"""Process groups beside the default one, made the way SGLang makes its end of a weight update group.

torch.distributed has one default group a process; the trainer and an engine need a group that spans both. SGLang's
recipe is a TCP rendezvous store hosted by rank 0, prefixed with the group's name, handed to torch's internal group
constructor; both ends must agree on it to the letter. The default group must not have been bound to a device
(`init_process_group(device_id=...)`): torch would then try to split this group off it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

_BLOCKING_WAIT = "TORCH_NCCL_BLOCKING_WAIT"


def host_store(address: str, timeout_s: float, port: int = 0) -> dist.TCPStore:
    """Host a rendezvous store on `address` only; it lives as long as the returned object. Raises OSError.

    port: 0 is any free one, `store.port`. TCPStore alone would listen on every interface, hence the socket made here.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen(1024)
    port = listener.getsockname()[1]
    return dist.TCPStore(
        address,
        port,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def join_group(
    backend: str, address: str, port: int, world_size: int, rank: int, group_name: str, timeout_s: float
) -> dist.ProcessGroup:
    """Join, as `rank`, the group whose rendezvous store `host_store` serves at `address:port`; blocks until all have.

    backend: nccl or gloo. Names of groups are unique in a process; leave with `leave_group`. Every operation in the
    group has the same deadline. Raises TimeoutError when not all `world_size` ranks came within `timeout_s` seconds,
    and at once where the store is gone: TCPStore alone would knock there for more than twice as long.
    """
    timeout = timedelta(seconds=timeout_s)
    try:
        socket.create_connection((address, port), timeout_s).close()
    except OSError as error:
        raise TimeoutError(f"group {group_name!r}: nobody waits at {address}:{port} ({error})") from error
    try:
        store = dist.TCPStore(address, port, world_size, is_master=False, timeout=timeout, wait_for_workers=True)
        with _failures_raised():
            group, _ = c10d._new_process_group_helper(
                world_size,
                rank,
                [],
                dist.Backend(backend),
                dist.PrefixStore(group_name, store),
                group_name=c10d.GroupName(group_name),
                timeout=timeout,
            )
    except (dist.DistError, RuntimeError) as error:
        raise TimeoutError(
            f"group {group_name!r}: rank {rank} waited {timeout_s:g} s for all {world_size} ranks at {address}:{port}: "
            f"{error}"
        ) from error
    assert isinstance(group, dist.ProcessGroup)
    c10d._world.pg_group_ranks[group] = {r: r for r in range(world_size)}
    return group


@contextmanager
def _failures_raised() -> Iterator[None]:
    """A group of NCCL that is made in here raises where it is waited for when a peer dies or is late.

    By default torch's watchdog ends the whole process then: an engine that dies would take the trainer along.
    """
    before = os.environ.get(_BLOCKING_WAIT)
    os.environ[_BLOCKING_WAIT] = "1"  # read when the group is made
    try:
        yield
    finally:
        if before is None:
            del os.environ[_BLOCKING_WAIT]
        else:
            os.environ[_BLOCKING_WAIT] = before


def leave_group(group: dist.ProcessGroup) -> None:
    """Leave a group made by `join_group`."""
    dist.destroy_process_group(group)
