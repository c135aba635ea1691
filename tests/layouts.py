"""Several layouts, one after the other, in one process group: processes for each would cost more than they do."""

from __future__ import annotations

import torch.distributed as dist

from rloop_mcore.actor import parallel


def leave_layout() -> None:
    """Leave a layout's groups; torchrun's stays, so that another layout can follow.

    Megatron only forgets its groups, and their threads and buffers stay.
    """
    parallel._forget_groups()
    dist.barrier()  # no rank waits in them for this one any more
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
