"""Run by test_channel: one engine's end of weight broadcasts. A JSON line in: a group to join; a line out: the tensors.

`sglang` forms the group in the steps SGLang's engine takes, with torch's own tcp:// rendezvous; `ours` by join_group.
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from rloop_mcore.platform.process import die_with_parent
from rloop_mcore.platform.process_group import join_group, leave_group


def join_as_sglang(address: str, port: int, world_size: int, rank: int, name: str) -> dist.ProcessGroup:
    timeout = timedelta(seconds=60)
    store, rank, world_size = next(dist.rendezvous(f"tcp://{address}:{port}", rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    group, _ = c10d._new_process_group_helper(
        world_size,
        rank,
        [],
        c10d.Backend("gloo"),
        c10d.PrefixStore(name, store),
        group_name=name,
        backend_options=None,
        timeout=timeout,
    )
    c10d._world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group


def receive(how: str, address: str, port: int, world_size: int, rank: int, name: str, shapes: list) -> list:
    if how == "sglang":
        group = join_as_sglang(address, port, world_size, rank, name)
    else:
        group = join_group("gloo", address, port, world_size, rank, name, timeout_s=60)
    received = [torch.empty(shape) for shape in shapes]
    for tensor in received:
        dist.broadcast(tensor, src=0, group=group)
    leave_group(group)
    return [tensor.tolist() for tensor in received]


if __name__ == "__main__":
    die_with_parent(os.getppid())
    if sys.argv[1] == "sglang":  # its workers have a default group of their own
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for line in sys.stdin:
        print(json.dumps(receive(sys.argv[1], *json.loads(line))), flush=True)
