"""The hashes that engines answer /weights_checker with, recomputed from what is sent to them."""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

import torch
import xxhash


class Hasher(Protocol):
    """A checksum that grows; the order of what it takes matters."""

    def update(self, tensor: torch.Tensor) -> None: ...

    def hexdigest(self) -> str: ...


class _BytesHasher:
    """A hash over host memory; SGLang's is the first 16 digits of sha256, the embedded engine's XXH3, which has 16."""

    def __init__(self, state: Any) -> None:
        self._state = state

    def update(self, tensor: torch.Tensor) -> None:
        self._state.update(memoryview(as_bytes(tensor).cpu().numpy()))

    def hexdigest(self) -> str:
        return str(self._state.hexdigest())[:16]


def embedded_hasher() -> Hasher:
    """XXH3 (64 bits): about as fast as memory, so that verifying costs a sync next to nothing."""
    return _BytesHasher(xxhash.xxh3_64())


def sglang_cpu_hasher() -> Hasher:
    return _BytesHasher(hashlib.sha256())


class TileHasher:
    """SGLang's checksum of a CUDA tensor, in torch's operations, on the device the tensors are on.

    Of 32-bit words w at places i: two sums, over a tile of 8192 words, of fmix32(w ^ p(i)) (MurmurHash3's finaliser;
    p is the place, scrambled by a seed), each mixed with the size and finalised; the tiles' 64-bit values are added and
    the sum goes through the finaliser of SplitMix64. (sglang/kernels/ops/memory/gpu_tensor_hash.py, 0.5.23.)
    """

    _TILE = 8192
    _SEED = 0x243F6A88
    _PLACE = (0x27D4EB2D, 0x165667B1)
    _ROTATE = (15, 13)
    _WORDS = 1 << 24  # hashed at once

    def __init__(self) -> None:
        self._words = 0
        self._open = [0, 0]  # sums of the tile that is not full yet
        self._full: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])  # of the tiles before it

    def update(self, tensor: torch.Tensor) -> None:
        """Raises ValueError for a size that is not a whole number of 32-bit words."""
        flat = as_bytes(tensor)
        if flat.numel() % 4:
            raise ValueError(f"a checksum wants tensors of a multiple of 4 bytes, got {flat.numel()}")
        for words in flat.view(torch.int32).split(self._WORDS):
            if len(words):
                self._take(words)

    def _take(self, words: torch.Tensor) -> None:
        places = torch.arange(self._words, self._words + len(words), device=words.device).to(torch.int32)
        lead = self._words % self._TILE
        self._words += len(words)
        trail = -(lead + len(words)) % self._TILE
        seeds = (self._SEED, (self._SEED * 0x9E3779B1) ^ 0xDEADBEEF)
        for lane, (seed, factor, turn) in enumerate(zip(seeds, self._PLACE, self._ROTATE, strict=True)):
            scrambled = (places * _signed(factor) + _signed(seed)) ^ _rotate(places, turn)
            mixed = torch.nn.functional.pad(_fmix32(words ^ scrambled), (lead, trail))
            sums = mixed.view(-1, self._TILE).sum(1, dtype=torch.int64)
            sums[0] += self._open[lane]
            self._open[lane] = int(sums[-1]) if trail else 0
            self._full[lane].append(sums[:-1] if trail else sums)

    def hexdigest(self) -> str:
        if self._words == 0:
            return f"{0:016x}"
        size = _signed(self._words * 4)
        halves = []
        for lane in range(2):
            last = torch.tensor([self._open[lane]] if self._words % self._TILE else [], dtype=torch.int64)
            sums = torch.cat([*(part.cpu() for part in self._full[lane]), last])
            halves.append(_fmix32(_low32(sums) ^ size).to(torch.int64) & 0xFFFFFFFF)
        total = sum(high << 32 | low for high, low in zip(halves[0].tolist(), halves[1].tolist(), strict=True))
        return f"{_splitmix64(total):016x}"


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's values as one flat uint8 tensor, of its own memory where that is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _signed(value: int) -> int:
    """The int32 of the same 32 bits."""
    return (value & 0xFFFFFFFF) - ((value & 0x80000000) << 1)


def _low32(sums: torch.Tensor) -> torch.Tensor:
    return ((sums & 0xFFFFFFFF) ^ 0x80000000).sub(0x80000000).to(torch.int32)


def _right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """The logical shift of int32 (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _rotate(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x << bits) | _right(x, 32 - bits)


def _fmix32(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _right(x, 16)) * _signed(0x85EBCA6B)
    x = (x ^ _right(x, 13)) * _signed(0xC2B2AE35)
    return x ^ _right(x, 16)


def _splitmix64(x: int) -> int:
    mask = (1 << 64) - 1
    x &= mask
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & mask
    return x ^ x >> 31
