"""Tensors packed into buckets of bytes, which is how weights travel to the engines."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from rloop_mcore.rollout.checksums import ExpectedChecksums
from rloop_mcore.rollout.fp8 import kept_as_sent
from rloop_mcore.rollout.handles import shared_memory

if TYPE_CHECKING:
    from rloop_mcore.protocols import NamedTensors


@dataclass(frozen=True)
class Bucket:
    """Tensors that travel together, as one uint8 broadcast: one right behind the other."""

    tensors: list[tuple[str, torch.Tensor]]  # by name; views of the data
    data: torch.Tensor  # uint8 [bytes]


class Buffers:
    """Cuts a stream of tensors into buckets, in two buffers by turns: the next is filled while one is sent.

    Those in host memory are kept from sync to sync, since fresh memory is slow on its first use.
    """

    def __init__(self, bucket_bytes: int, host: bool, shared: bool = False) -> None:
        """host: buckets in host memory, wherever the tensors are; shared: in memory that other processes can open."""
        self.bucket_bytes, self._host, self._shared = bucket_bytes, host, shared
        self._memory = [torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)]

    def fill(
        self, weights: NamedTensors, dtype: torch.dtype, checksums: Collection[ExpectedChecksums] = ()
    ) -> Iterator[Bucket]:
        """Buckets of at most `bucket_bytes` with the tensors in `dtype`, those of FP8 in their own; a larger tensor is
        a bucket of its own.

        A bucket's memory is overwritten by the bucket after the next, unless it was handed out on a GPU. Nothing pads a
        bucket (SGLang wants it so): a tensor whose place would not be a multiple of its item size begins another one.
        """
        places: list[tuple[str, torch.Tensor]] = []
        end, turn = 0, 0
        for name, tensor in weights:
            sent = tensor.dtype if kept_as_sent(name, tensor.dtype) else dtype
            size = prod(tensor.shape) * sent.itemsize
            if places and (end + size > self.bucket_bytes or end % sent.itemsize):
                yield Bucket(places, self._memory[turn][:end])
                places, end, turn = [], 0, 1 - turn
                if self._shared:  # an engine of several ranks answers before all of them have copied
                    self.release()
            memory = self._reserve(turn, max(size, self.bucket_bytes), tensor.device)
            place = memory[end : end + size].view(sent).view(tensor.shape)
            if isinstance(tensor, torch.Tensor):
                place.copy_(tensor.detach())
            else:
                tensor.gather_into(place)
            for expected in checksums:
                expected.add(name, place)
            places.append((name, place))
            end += size
        if places:
            yield Bucket(places, self._memory[turn][:end])

    def release(self) -> None:
        """Give up buffers on a GPU: training needs the memory, and torch hands it out again at no cost.

        Memory that is shared by CUDA IPC also grows a chain of torch's counters, a link a tensor that is handed out,
        whose end is a recursion as deep: without this, one of all syncs.
        """
        for turn, memory in enumerate(self._memory):
            if memory.device.type != "cpu":
                self._memory[turn] = torch.empty(0, dtype=torch.uint8)

    def _reserve(self, turn: int, size: int, weights: torch.device) -> torch.Tensor:
        device = torch.device("cpu") if self._host else weights
        if self._memory[turn].numel() < size or self._memory[turn].device != device:
            self._memory[turn] = torch.empty(0, dtype=torch.uint8)  # before there is more of it
            shared = self._shared and device.type == "cpu"
            self._memory[turn] = shared_memory(size) if shared else torch.empty(size, dtype=torch.uint8, device=device)
        return self._memory[turn]
