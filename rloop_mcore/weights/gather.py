"""The HF tensors one after the other, their shards brought to rank 0 from wherever they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.fp8_utils import is_float8tensor

from rloop_mcore.weights.family import Parameter, Piece, Split

_CHUNK_BYTES = 1 << 24  # of a shard, on their way at once
_NOBODY = torch.iinfo(torch.int64).max
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Held = Mapping[str, torch.Tensor]  # this rank's parameters by canonical name
Parts = Sequence[tuple[int, Piece]]  # of a tensor: the rank that owns each, and where it is


def shard_number(parameter: Parameter) -> tuple[int, int]:
    """Which shard of the parameter this rank would hold, and of how many."""
    if parameter.split is Split.REPLICATED:
        return 0, 1
    if parameter.expert:
        return (
            parallel_state.get_expert_tensor_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_world_size(),
        )
    return parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()


def scattered(parameters: Sequence[Parameter], held: Held) -> Iterator[tuple[str, ScatteredTensor]]:
    """Collective over all ranks: rank 0 yields each HF tensor, to be gathered before the next; the others nothing.

    Each shard comes from the lowest rank that holds it, in chunks: nobody needs memory for a shard, but of one that is
    kept in FP8. All goes through the default group: with NCCL, batched transfers use its one communicator, where a
    plain send would open one for every pair of ranks.
    """
    rank = dist.get_rank()
    scratch = _Scratch(next(iter(held.values())).device)
    for parameter, entry in zip(parameters, _directory(parameters, held), strict=True):
        mine = _plain(held[parameter.name]) if rank in entry.owners else None
        shards = len(entry.owners)
        pieces = [(owner, piece) for i, owner in enumerate(entry.owners) for piece in parameter.pieces(i, shards)]
        for number, source in enumerate(parameter.sources):
            parts = [(owner, piece) for owner, piece in pieces if piece.source == number]
            if rank == 0:
                tensor = ScatteredTensor(source.shape, entry.dtype, parts, mine, scratch)
                yield source.name, tensor
                tensor.finish()
            elif mine is not None:
                blocks = [mine[piece.in_shard] for owner, piece in parts if owner == rank]
                for rows in chain.from_iterable(_chunks(block, mine.dtype) for block in blocks):
                    _transfer(dist.isend, rows, 0)
                    # NCCL counts from when a transfer is queued: all of them now would have one deadline together.
                    torch.cuda.current_stream().synchronize()


class ScatteredTensor:
    """Implements `protocols.Scattered`, on rank 0. It takes the memory of one chunk, beside where it is gathered."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, parts: Parts, mine: torch.Tensor | None, scratch: _Scratch
    ) -> None:
        """mine: rank 0's own shard of the parameter, where it owns one."""
        self.shape, self.dtype, self.device = shape, dtype, scratch.device
        self._parts, self._mine, self._scratch = parts, mine, scratch
        self._gathered = False

    def gather_into(self, place: torch.Tensor) -> None:
        """Lay the tensor at `place`, which has its shape, in the place's dtype."""
        self._gathered = True
        for owner, piece in self._parts:
            block = place[piece.in_source]
            if owner == 0:
                block.copy_(self._own(piece))
                continue
            for rows in _chunks(block, self.dtype):
                fits = rows.is_contiguous() and (rows.dtype, rows.device) == (self.dtype, self.device)
                landing = rows if fits else self._scratch.of(rows.shape, self.dtype)
                _transfer(dist.irecv, landing, owner)
                if not fits:
                    rows.copy_(landing)

    def gather(self) -> torch.Tensor:
        """The tensor, which is a view of the parameter where rank 0 holds the whole of it."""
        if len(self._parts) == 1 and self._parts[0][0] == 0:
            return self._own(self._parts[0][1])
        place = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        self.gather_into(place)
        return place

    def finish(self) -> None:
        """The stream goes on: what the others send of the tensor has to be taken, wanted or not."""
        if not self._gathered:
            self.gather_into(torch.empty(self.shape, dtype=self.dtype, device="meta"))  # nowhere

    def _own(self, piece: Piece) -> torch.Tensor:
        assert self._mine is not None
        return self._mine[piece.in_shard]


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """What Transformer Engine keeps in FP8 in the dtype that it stands for: its own kind of tensor has no bytes."""
    tensor = tensor.detach()
    return (tensor.dequantize() if is_float8tensor(tensor) else tensor).contiguous()


class _Scratch:
    """Memory that is used again and again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory = torch.empty(0, dtype=torch.uint8, device=device)

    def of(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        size = prod(shape) * dtype.itemsize
        if self._memory.numel() < size:
            self._memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        return self._memory[:size].view(dtype).view(*shape)


def _chunks(block: torch.Tensor, sent: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The rows of a block that travel together, in the dtype `sent`: both ends cut alike."""
    row = prod(block.shape[1:]) * sent.itemsize
    return block.split(max(1, _CHUNK_BYTES // row))


def _transfer(operation: Callable[..., dist.Work | None], tensor: torch.Tensor, peer: int) -> None:
    for work in dist.batch_isend_irecv([dist.P2POp(operation, tensor, peer)]):
        work.wait()


@dataclass(frozen=True)
class _Entry:
    """A parameter's shards: which rank sends each, and the dtype that all of them have."""

    owners: list[int]
    dtype: torch.dtype


def _directory(parameters: Sequence[Parameter], held: Held) -> list[_Entry]:
    """Collective: one entry a parameter, the same on every rank.

    Every rank fills in the rows of what it holds, and the minimum over the ranks completes them: the lowest owner of
    each shard, and the dtype that all its holders agree on.
    """
    numbers = [shard_number(parameter) for parameter in parameters]
    most = max(shards for _, shards in numbers)
    rows = [[_NOBODY] * (most + 1) for _ in parameters]
    for row, parameter, (number, _) in zip(rows, parameters, numbers, strict=True):
        if parameter.name in held:
            row[number] = dist.get_rank()
            row[most] = _DTYPES.index(held[parameter.name].dtype)
    table = torch.tensor(rows, device=next(iter(held.values())).device)
    dist.all_reduce(table, op=dist.ReduceOp.MIN)
    entries = []
    for row, parameter, (_, shards) in zip(table.tolist(), parameters, numbers, strict=True):
        if _NOBODY in row[:shards]:
            raise RuntimeError(f"no rank holds shard {row.index(_NOBODY)} of Megatron parameter {parameter.name}")
        entries.append(_Entry(row[:shards], _DTYPES[row[most]]))
    return entries
