"""Weights, optimizer, schedule and RNG as one Megatron checkpoint that any layout can load."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel

from rloop_mcore.actor.optimizer import PolicyOptimizer
from rloop_mcore.platform.files import atomic_path

_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def save(path: Path, chunks: list[DistributedDataParallel], optimizer: PolicyOptimizer) -> None:
    """Collective: write the directory `path` atomically; it is there, whole and durable, when this returns."""
    # Megatron's default starts a manager process for this queue; a synchronous save reads it in the same process.
    filesystem_async._results_queue = queue.Queue()
    with ExitStack() as stack:
        target = [str(stack.enter_context(_new_directory(path)))] if dist.get_rank() == 0 else [""]
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(target, src=0)
        strategy = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
        dist_checkpointing.save(
            _state(chunks, optimizer, is_loading=False),
            target[0],
            sharded_strategy=strategy,
            validate_access_integrity=False,
        )
    if dist.get_world_size() > 1:
        dist.barrier()


def load(path: Path, chunks: list[DistributedDataParallel], optimizer: PolicyOptimizer) -> None:
    """Collective: restore what `save` wrote at this or another layout, into a model and optimizer already built."""
    state = dist_checkpointing.load(_state(chunks, optimizer, is_loading=True), str(path))
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(state[f"model{i}"])
    with ExitStack() as stack:
        for part in optimizer.megatron.chained_optimizers:
            stack.enter_context(_step_left_alone(part))
        optimizer.megatron.load_state_dict(state["optimizer"])
    for part in optimizer.megatron.chained_optimizers:
        for parameter_state in part.optimizer.state.values():
            if "step" in parameter_state:  # Megatron leaves one tensor for all: steps would count double
                parameter_state["step"] = parameter_state["step"].clone()
    optimizer.update = state["update"]
    torch.set_rng_state(state["rng"])


def _state(chunks: list[DistributedDataParallel], optimizer: PolicyOptimizer, is_loading: bool) -> dict[str, Any]:
    # The policy has no dropout: the only generator is the default one, the same on every rank.
    state: dict[str, Any] = {"update": optimizer.update, "rng": torch.get_rng_state()}
    models = {f"model{i}": chunk.module.sharded_state_dict(metadata=_METADATA) for i, chunk in enumerate(chunks)}
    with ExitStack() as stack:
        for part in optimizer.megatron.chained_optimizers:
            stack.enter_context(_bucket_padding_kept(part))
        state["optimizer"] = optimizer.megatron.sharded_state_dict(models, is_loading=is_loading, metadata=_METADATA)
    return state | models


@contextmanager
def _new_directory(path: Path) -> Iterator[Path]:
    with atomic_path(path) as temporary:
        temporary.mkdir()
        yield temporary


@contextmanager
def _bucket_padding_kept(optimizer: Any) -> Iterator[None]:
    """Megatron gathers a buffer's state without the padding between buckets, then cuts it at offsets that count it.

    Left alone, the optimizer state of a pipeline stage with tied embeddings (two buckets) is saved shifted, silently.
    """
    original = optimizer.get_parameter_state_dp_zero

    def get_state(*args: Any, **kwargs: Any) -> dict[Any, Any]:
        state = original(*args, **kwargs)
        for index, buffer in enumerate(optimizer.buffers):
            for tensors in state[index].values():
                for key, flat in tensors.items():
                    if isinstance(flat, torch.Tensor):
                        tensors[key] = _with_padding(flat, buffer)
        return state

    optimizer.get_parameter_state_dp_zero = get_state
    try:
        yield
    finally:
        del optimizer.get_parameter_state_dp_zero


def _with_padding(flat: torch.Tensor, buffer: Any) -> torch.Tensor:
    padded = flat.new_zeros(buffer.numel)
    start = 0
    for bucket in buffer.buckets:
        stop = start + bucket.numel_unpadded
        padded[bucket.offset : bucket.offset + stop - start] = flat[start:stop]
        start = stop
    return padded


@contextmanager
def _step_left_alone(optimizer: Any) -> Iterator[None]:
    """Torch's AdamW keeps `step` beside the moments; Megatron looks for it in the checkpoint, where it isn't."""
    original = optimizer._set_main_param_and_optimizer_states

    def set_states(parameter: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = optimizer.model_param_group_index_map[parameter]
        state = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][order]]
        original(parameter, {**tensors, "step": state["step"]} if "step" in state else tensors)

    optimizer._set_main_param_and_optimizer_states = set_states
    try:
        yield
    finally:
        del optimizer._set_main_param_and_optimizer_states
