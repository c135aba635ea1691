"""Megatron's own saving and loading of a model, which conversions are held to."""

from __future__ import annotations

import inspect
import queue
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

_OWN_WRITER = (  # 0.19's default needs nvidia_resiliency_ext; 0.16 has no other
    {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters else {}
)


def save(chunks: Sequence[torch.nn.Module], path: Path) -> None:
    """Collective: as a training run of this layout saves its weights."""
    if dist.get_rank() == 0:
        path.mkdir()
    dist.barrier()
    filesystem_async._results_queue = queue.Queue()  # the default's is a process that has to be started
    dist_checkpointing.save(
        _state(chunks),
        str(path),
        sharded_strategy=TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1),
        validate_access_integrity=False,
        **_OWN_WRITER,
    )


def load(chunks: Sequence[torch.nn.Module], path: Path) -> None:
    """Collective: into chunks of this layout."""
    state = dist_checkpointing.load(_state(chunks), str(path))
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(state[f"model{number}"])


def _state(chunks: Sequence[torch.nn.Module]) -> dict:
    return {f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}
