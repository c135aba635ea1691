"""Tensors handed to a process of the same host by reference: shared memory on a CPU, CUDA IPC on a GPU."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler

import torch
import torch.multiprocessing  # teaches ForkingPickler about tensors


def shared_memory(size: int) -> torch.Tensor:
    """uint8 [size] in /dev/shm. Other tensors' memory moves there when it is handed out for the first time."""
    storage = torch.UntypedStorage._new_using_filename_cpu(size)  # share_memory_() would take the memory twice
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def handles_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """What /update_weights_from_tensor takes of them: (name, tensor) pairs, pickled, in base64; for one reader.

    The reader sees what is written to them until it drops its own.
    """
    buffer = io.BytesIO()
    with _by_file_name():
        ForkingPickler(buffer).dump(list(tensors))
    return base64.b64encode(buffer.getvalue()).decode("ascii")


@contextmanager
def _by_file_name() -> Iterator[None]:
    """The default, by file descriptor, is for processes that share a parent."""
    strategy = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(strategy)
