"""Token sequences to packed micro-batches: sequences end to end, balanced over micro-batches and ranks by tokens."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Row:
    """A sequence with its loss on the response tokens. The last three are [response], or empty where not needed."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]
    weight: float = 1.0
    advantage: float = 0.0
    old_logprobs: Sequence[float] = ()
    engine_logprobs: Sequence[float] = ()
    reference_logprobs: Sequence[float] = ()

    def __len__(self) -> int:
        """The positions that predict something: the last token is a target only."""
        return len(self.prompt_ids) + len(self.response_ids) - 1


@dataclass(frozen=True)
class MicroBatch:
    """Packed sequences, or this context-parallel rank's part of each: chunks r and 2*cp - 1 - r of 2*cp.

    `places` [tokens] number the tokens of the whole batch, -1 for padding. The tokens at `positions` [n] predict the
    response tokens `targets` [n]; all further tensors are [n] too: `slots` numbers the response tokens of the whole
    batch, `sequences` the sequences of this micro-batch. `lengths` are theirs over all context-parallel ranks; the last
    one may be padding. `boundaries` [sequences + 1], int32: where they begin and end.
    """

    tokens: torch.Tensor
    places: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    slots: torch.Tensor
    sequences: torch.Tensor
    weights: torch.Tensor
    advantages: torch.Tensor
    old_logprobs: torch.Tensor
    engine_logprobs: torch.Tensor
    reference_logprobs: torch.Tensor
    boundaries: torch.Tensor
    lengths: tuple[int, ...]

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {n: v.to(device) for n, v in values.items() if isinstance(v, torch.Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class Share:
    """Which part of a batch a rank gets, and what shapes its layout allows.

    `rank` of `ranks` data-parallel replicas, each of `cp` context-parallel ranks, of which this is `cp_rank`. A rank's
    tokens of a micro-batch are at most `max_tokens` (or one sequence) and a multiple of `multiple`; a replica's
    micro-batches are a multiple of `count_multiple`.
    """

    rank: int = 0
    ranks: int = 1
    cp_rank: int = 0
    cp: int = 1
    max_tokens: int = 16384
    multiple: int = 1
    count_multiple: int = 1


def micro_batches(batch: Sequence[Row], share: Share) -> list[MicroBatch]:
    """A rank's micro-batches. All ranks get the same number, and all micro-batches have the same number of tokens."""
    unit = 2 * share.cp if share.cp > 1 else 1
    lengths = [-(-len(row) // unit) * unit for row in batch]
    limit = max(share.max_tokens * share.cp, *lengths)
    count = share.count_multiple * share.ranks
    packs = partition(lengths, count * -(-sum(lengths) // (limit * count)))
    while max(sum(lengths[i] for i in pack) for pack in packs) > limit:
        packs = partition(lengths, len(packs) + count)
    multiple = np.lcm(unit, share.cp * share.multiple)
    tokens = -(-max(sum(lengths[i] for i in pack) for pack in packs) // multiple) * multiple
    starts = np.cumsum([(0, 0), *((len(row), len(row.response_ids)) for row in batch)], axis=0)
    return [_pack(batch, pack, lengths, starts, int(tokens), share) for pack in packs[share.rank :: share.ranks]]


def padding_share(batch: Sequence[Row], packed: Sequence[MicroBatch], share: Share) -> float:
    """The share of all ranks' tokens that are padding."""
    return 1.0 - sum(len(row) for row in batch) / (len(packed) * packed[0].tokens.numel() * share.cp * share.ranks)


def partition(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """The indices of `lengths` in `parts` lists of nearly equal sums: the longest first, each to the smallest list.

    (Graham's LPT rule.) Within a list the lengths descend.
    """
    lists: list[list[int]] = [[] for _ in range(parts)]
    smallest = [(0, part) for part in range(parts)]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        total, part = heapq.heappop(smallest)
        lists[part].append(index)
        heapq.heappush(smallest, (total + lengths[index], part))
    return lists


def _pack(
    batch: Sequence[Row], pack: Sequence[int], lengths: Sequence[int], starts: np.ndarray, size: int, share: Share
) -> MicroBatch:
    """The rows `pack` in `size` tokens over all context-parallel ranks.

    `starts` [rows + 1, 2]: the tokens and the response tokens of the batch before each row.
    """
    tokens, places = np.zeros(size, dtype=np.int64), np.full(size, -1, dtype=np.int64)
    response = np.full(size, -1, dtype=np.int64)  # position -> its place among the pack's response tokens
    predicting: list[np.ndarray] = []
    start = 0
    for index in pack:
        row = batch[index]
        ids = (*row.prompt_ids, *row.response_ids)
        tokens[start : start + len(row)] = ids[:-1]
        places[start : start + len(row)] = np.arange(starts[index, 0], starts[index + 1, 0])
        predicting.append(np.arange(start + len(row.prompt_ids) - 1, start + len(row)))
        start += lengths[index]
    where = np.concatenate(predicting) if predicting else np.empty(0, dtype=np.int64)
    response[where] = np.arange(len(where))
    whole = [lengths[index] for index in pack] + ([size - start] if start < size else [])
    mine = _on_context_rank(whole, share.cp_rank, share.cp)
    chosen = response[mine]
    positions = np.flatnonzero(chosen >= 0)
    order = chosen[positions]

    def column(values: Sequence[Sequence[float] | np.ndarray], dtype: type) -> torch.Tensor:
        flat = np.concatenate([np.asarray(v, dtype=dtype) for v in values]) if values else np.empty(0, dtype=dtype)
        return torch.from_numpy(flat[order])

    rows = [batch[index] for index in pack]
    numbers = [len(row.response_ids) for row in rows]
    return MicroBatch(
        tokens=torch.from_numpy(tokens[mine]),
        places=torch.from_numpy(places[mine]),
        positions=torch.from_numpy(positions),
        targets=column([row.response_ids for row in rows], np.int64),
        slots=column([np.arange(starts[i, 1], starts[i + 1, 1]) for i in pack], np.int64),
        sequences=column([np.full(n, i) for i, n in enumerate(numbers)], np.int64),
        weights=column([np.full(n, row.weight) for row, n in zip(rows, numbers, strict=True)], np.float32),
        advantages=column([np.full(n, row.advantage) for row, n in zip(rows, numbers, strict=True)], np.float32),
        old_logprobs=column([_or_zeros(row.old_logprobs, row) for row in rows], np.float32),
        engine_logprobs=column([_or_zeros(row.engine_logprobs, row) for row in rows], np.float32),
        reference_logprobs=column([_or_zeros(row.reference_logprobs, row) for row in rows], np.float32),
        boundaries=torch.from_numpy(np.cumsum([0, *whole], dtype=np.int32)),
        lengths=tuple(whole),
    )


def _or_zeros(values: Sequence[float], row: Row) -> Sequence[float]:
    return values if len(values) else [0.0] * len(row.response_ids)


def _on_context_rank(lengths: Sequence[int], rank: int, ranks: int) -> np.ndarray:
    """The places that a context-parallel rank holds: two chunks a sequence, so that causal work is even (zig-zag)."""
    if ranks == 1:
        return np.arange(sum(lengths))
    places, start = [], 0
    for length in lengths:
        chunk = length // (2 * ranks)
        for part in (rank, 2 * ranks - 1 - rank):
            places.append(np.arange(start + part * chunk, start + (part + 1) * chunk))
        start += length
    return np.concatenate(places)
