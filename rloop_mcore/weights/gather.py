"""The shards of one parameter after the other, brought to rank 0 from wherever they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from rloop_mcore.weights.family import Parameter, Split

_NOBODY = torch.iinfo(torch.int64).max
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Held = Mapping[str, torch.nn.Parameter]  # this rank's parameters by canonical name
Of = Callable[[torch.nn.Parameter], torch.Tensor]


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


def gather(parameters: Sequence[Parameter], held: Held, of: Of) -> Iterator[tuple[Parameter, list[torch.Tensor]]]:
    """Collective over all ranks: rank 0 yields each parameter with all its shards in order, the others nothing.

    `of` gives the tensor that stands for a held parameter, of the same shape. Each shard comes from the lowest rank
    that holds it. All goes through the default group: with NCCL, batched transfers use its one communicator, where a
    plain send would open one for every pair of ranks.
    """
    rank = dist.get_rank()
    device = next(iter(held.values())).device
    for parameter, entry in zip(parameters, _directory(parameters, held, of), strict=True):
        mine = of(held[parameter.name]).detach().contiguous() if rank in entry.owners else None
        if rank == 0:
            yield parameter, _collect(entry, mine, device)
        elif mine is not None:
            _transfer([dist.P2POp(dist.isend, mine, 0)])


def _collect(entry: _Entry, mine: torch.Tensor | None, device: torch.device) -> list[torch.Tensor]:
    """Rank 0: all shards of a parameter. Nothing here holds on to them: memory for one parameter at a time."""
    shards = [
        mine if mine is not None and owner == 0 else torch.empty(entry.shape, dtype=entry.dtype, device=device)
        for owner in entry.owners
    ]
    pairs = zip(shards, entry.owners, strict=True)
    _transfer([dist.P2POp(dist.irecv, shard, owner) for shard, owner in pairs if owner != 0])
    return shards


def _transfer(operations: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()


@dataclass(frozen=True)
class _Entry:
    """A parameter's shards: which rank sends each, and the shape and dtype that all of them have."""

    owners: list[int]
    shape: list[int]
    dtype: torch.dtype


def _directory(parameters: Sequence[Parameter], held: Held, of: Of) -> list[_Entry]:
    """Collective: one entry a parameter, the same on every rank.

    Every rank fills in the rows of what it holds, and the minimum over the ranks completes them: the lowest owner of
    each shard, and the shape and dtype that all its holders agree on.
    """
    numbers = [shard_number(parameter) for parameter in parameters]
    most = max(shards for _, shards in numbers)
    rows = [[_NOBODY] * (most + 3) for _ in parameters]
    for row, parameter, (number, _) in zip(rows, parameters, numbers, strict=True):
        if parameter.name in held:
            tensor = of(held[parameter.name])
            row[number] = dist.get_rank()
            row[most : most + 1 + tensor.dim()] = [_DTYPES.index(tensor.dtype), *tensor.shape]
    table = torch.tensor(rows, device=next(iter(held.values())).device)
    dist.all_reduce(table, op=dist.ReduceOp.MIN)
    entries = []
    for row, parameter, (_, shards) in zip(table.tolist(), parameters, numbers, strict=True):
        if _NOBODY in row[:shards]:
            raise RuntimeError(f"no rank holds shard {row.index(_NOBODY)} of Megatron parameter {parameter.name}")
        shape = [size for size in row[most + 1 :] if size != _NOBODY]
        entries.append(_Entry(row[:shards], shape, _DTYPES[row[most]]))
    return entries
