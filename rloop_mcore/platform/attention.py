"""Core attention on the CPU: torch's SDPA over packed sequences, split over context-parallel ranks or not."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig


class CausalAttention(torch.nn.Module):
    """Causal within each sequence; consecutive sequences of one length go through one call of SDPA.

    Padding needs no mask: it is at the end of a sequence, or a sequence of its own. With context parallelism a rank
    holds chunks r and 2 * cp - 1 - r of the 2 * cp of each sequence (Megatron's zig-zag, which balances the causal
    work); keys and values are gathered, queries stay.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.cp = config.context_parallel_size

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *_: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **unused: Any,
    ) -> torch.Tensor:
        """Packed: query [tokens, heads, head], key and value [tokens, groups, head] -> [tokens, heads * head].

        Not packed: [seq, batch, heads, head] and [seq, batch, groups, head] -> [seq, batch, heads * head]; whole
        sequences only.
        """
        if packed_seq_params is None:
            rows = self._attend(*(x.transpose(0, 1) for x in (query, key, value)))
            return rows.transpose(0, 1).flatten(2)
        runs = _runs(packed_seq_params.cu_seqlens_q, self.cp)
        sizes = [count * length for count, length in runs]
        if self.cp > 1:
            key, value = _gather(key, value)
        outputs = []
        # `split` and not slices: the gradient of a slice is a whole tensor of zeros.
        pieces = zip(query.split(sizes), key.split(sizes, dim=-3), value.split(sizes, dim=-3), strict=True)
        for (count, length), (q, k, v) in zip(runs, pieces, strict=True):
            shape = (count, length)
            if self.cp == 1:
                output = self._attend(*(x.unflatten(0, shape) for x in (q, k, v)))
            else:
                output = self._attend_zigzag(q.unflatten(0, shape), *(x.unflatten(1, shape) for x in (k, v)))
            outputs.append(output.flatten(0, 1).flatten(1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """query [n, q, heads, head], key and value [n, k, groups, head] -> the query's shape; causal without a mask."""
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        return context.transpose(1, 2)

    def _attend_zigzag(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """query [n, 2 chunks, heads, head], key and value [cp, n, 2 chunks, groups, head] -> the query's shape."""
        key, value = _in_order(key), _in_order(value)
        chunk = query.size(1) // 2
        rank = parallel_state.get_context_parallel_rank()
        outputs = []
        for part, position in zip(query.split(chunk, dim=1), (rank, 2 * self.cp - 1 - rank), strict=True):
            end = (position + 1) * chunk
            mask = torch.ones(chunk, end, dtype=torch.bool, device=query.device).tril(end - chunk)
            outputs.append(self._attend(part, key[:, :end], value[:, :end], mask))
        return torch.cat(outputs, dim=1)


def _runs(cu_seqlens: torch.Tensor, cp: int) -> list[tuple[int, int]]:
    """(count, tokens of each on this rank) of the consecutive sequences of one length; empty ones are left out."""
    lengths = cu_seqlens.diff().tolist()
    return [(len(list(group)), length // cp) for length, group in groupby(lengths) if length]


def _gather(key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[tokens, groups, head] of this rank -> [cp, tokens, groups, head] of all; gradients are summed back."""
    group = parallel_state.get_context_parallel_group()
    both = torch.stack([key, value], dim=1)
    return gather_from_sequence_parallel_region(both, group=group).unflatten(0, (group.size(), -1)).unbind(2)


def _in_order(gathered: torch.Tensor) -> torch.Tensor:
    """[cp, n, 2 chunks, ...] as the ranks hold them -> [n, 2 * cp chunks, ...] in the order of the sequence."""
    early, late = gathered.chunk(2, dim=2)
    return torch.cat([early, late.flip(0)]).transpose(0, 1).flatten(1, 2)
