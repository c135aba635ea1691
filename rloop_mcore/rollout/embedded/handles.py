"""The engine's end of `rollout/handles.py`: opens memory that another process of this host shares, and runs nothing."""

from __future__ import annotations

import base64
import binascii
import io
import pickle
from collections import OrderedDict
from typing import Any

import torch
from torch.multiprocessing import reductions

from rloop_mcore.platform.unpickling import TORCH_DTYPES, ListedUnpickler
from rloop_mcore.rollout.embedded.params import BadRequest

_LISTED: dict[tuple[str, str], Any] = (
    TORCH_DTYPES
    | {
        ("torch.multiprocessing.reductions", name): getattr(reductions, name)
        for name in ("rebuild_tensor", "rebuild_typed_storage", "rebuild_cuda_tensor", "rebuild_storage_filename")
    }
    | {
        ("torch", "Tensor"): torch.Tensor,
        ("torch", "Size"): torch.Size,
        ("torch.storage", "UntypedStorage"): torch.UntypedStorage,
        ("torch", "UntypedStorage"): torch.UntypedStorage,
        ("torch.storage", "TypedStorage"): torch.TypedStorage,
        ("collections", "OrderedDict"): OrderedDict,
    }
)


def open_handles(text: Any) -> list[tuple[str, torch.Tensor]]:
    """The (name, tensor) pairs. Raises BadRequest where it is anything else."""
    try:
        pairs = ListedUnpickler(io.BytesIO(base64.b64decode(text, validate=True)), _LISTED).load()
        found = [(str(name), tensor) for name, tensor in pairs]
    except (pickle.UnpicklingError, binascii.Error, EOFError, TypeError, ValueError, RuntimeError) as error:
        raise BadRequest(f"serialized_named_tensors are no handles that can be opened: {error}") from error
    if not all(isinstance(tensor, torch.Tensor) for _, tensor in found):
        raise BadRequest("serialized_named_tensors holds something beside tensors")
    return found
