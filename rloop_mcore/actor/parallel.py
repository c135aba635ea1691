"""The process groups of a layout."""

from __future__ import annotations

import math
import os
import random
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from rloop_mcore import platform
from rloop_mcore.config import LayoutConfig
from rloop_mcore.errors import UserError


def initialize(layout: LayoutConfig, seed: int, timeout_s: float) -> None:
    """Join torchrun's group and cut it into Megatron's groups; without torchrun, be a group of one.

    Every collective afterwards raises when a rank waited `timeout_s` seconds. Raises UserError where the layout
    doesn't fit the number of processes.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    wanted = layout.tp * layout.pp * layout.cp * layout.dp
    if world != wanted:
        raise UserError(f"layout asks for {wanted} processes (tp*pp*cp*dp) and {world} were started.")
    timeout = timedelta(seconds=timeout_s)
    if not dist.is_initialized():
        store = None if "RANK" in os.environ else dist.HashStore()
        dist.init_process_group(
            platform.backend(), store=store, rank=int(os.environ.get("RANK", "0")), world_size=world, timeout=timeout
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        distributed_timeout_minutes=math.ceil(timeout_s / 60),
        create_gloo_process_groups=True,
    )
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def destroy() -> None:
    """Leave all groups; without it a rank may abort at exit."""
    if dist.is_initialized():
        _forget_groups()
        dist.destroy_process_group()


def _forget_groups() -> None:
    parallel_state.destroy_model_parallel()
    for name, value in vars(parallel_state).items():
        if isinstance(value, dist.ProcessGroup):  # Megatron keeps two, and a group held keeps its threads
            setattr(parallel_state, name, None)
