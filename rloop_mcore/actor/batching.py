"""Token sequences to the right-padded micro-batches of one data-parallel rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from rloop_mcore.types import Example, Trajectory


@dataclass(frozen=True)
class MicroBatch:
    """Position t predicts `targets[:, t]`; all tensors are [batch, seq].

    `mask` is true where the target is a response token. `old_logprobs` (the behaviour policy's) and `advantages` are
    zero elsewhere, and everywhere in fine-tuning.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor

    def rows(self, start: int, stop: int) -> MicroBatch:
        """The rows [start, stop) of every tensor."""
        return MicroBatch(*(getattr(self, field.name)[start:stop] for field in fields(self)))

    def to(self, device: torch.device) -> MicroBatch:
        """The same on another device."""
        return MicroBatch(*(getattr(self, field.name).to(device) for field in fields(self)))


def micro_batches(
    batch: Sequence[Trajectory | Example],
    advantages: Sequence[float] | None,
    rank: int,
    ranks: int,
    max_tokens: int,
    multiple: int = 1,
) -> list[MicroBatch]:
    """Data-parallel rank `rank` of `ranks`'s share of the batch, cut into micro-batches of one shape.

    Every rank gets the same number of micro-batches, of at most `max_tokens` padded tokens (or one sequence); rows that
    fill up the last ones have an empty mask. The sequence length is that of the whole batch, a multiple of `multiple`.
    """
    longest = max(len(row.prompt_ids) + len(row.response_ids) for row in batch) - 1
    length = -(-longest // multiple) * multiple
    share = -(-len(batch) // ranks)
    count = -(-share // max(1, max_tokens // length))
    size = -(-share // count)
    padded = _pad(batch[rank::ranks], None if advantages is None else advantages[rank::ranks], count * size, length)
    return [padded.rows(start, start + size) for start in range(0, count * size, size)]


def _pad(
    batch: Sequence[Trajectory | Example], advantages: Sequence[float] | None, rows: int, length: int
) -> MicroBatch:
    tokens, targets, mask, old_logprobs, weights = [], [], [], [], []
    for i, row in enumerate(batch):
        ids = [*row.prompt_ids, *row.response_ids]
        before, response, after = len(row.prompt_ids) - 1, len(row.response_ids), length - len(ids) + 1
        tokens.append(ids[:-1] + [0] * after)
        targets.append(ids[1:] + [0] * after)
        mask.append([False] * before + [True] * response + [False] * after)
        if advantages is not None:
            assert isinstance(row, Trajectory)
            old_logprobs.append([0.0] * before + list(row.logprobs) + [0.0] * after)
            weights.append([0.0] * before + [advantages[i]] * response + [0.0] * after)
    return MicroBatch(
        _tensor(tokens, rows, length, torch.long),
        _tensor(targets, rows, length, torch.long),
        _tensor(mask, rows, length, torch.bool),
        _tensor(old_logprobs, rows, length, torch.float32),
        _tensor(weights, rows, length, torch.float32),
    )


def _tensor(values: Sequence[Sequence[float]], rows: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """[rows, length], with rows of zeros below the values."""
    whole = torch.zeros(rows, length, dtype=dtype)
    if values:
        whole[: len(values)] = torch.tensor(values, dtype=dtype)
    return whole
