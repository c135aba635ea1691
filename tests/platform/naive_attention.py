"""Causal attention written out, one sequence at a time, and the zig-zag of context parallelism token by token."""

from __future__ import annotations

import torch


def packed_inputs(lengths: list[int], heads: int, groups: int, head: int = 16) -> list[torch.Tensor]:
    """query, key, value and the output's gradient, float64, the same in every process."""
    tokens = sum(lengths)
    draw = torch.Generator().manual_seed(tokens + heads)
    shapes = [(tokens, heads, head), (tokens, groups, head), (tokens, groups, head), (tokens, heads * head)]
    return [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]


def naive(
    lengths: list[int], query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor
) -> list[torch.Tensor]:
    """The output and the gradients of query, key and value."""
    query, key, value = (x.detach().clone().requires_grad_() for x in (query, key, value))
    share, outputs, start = query.size(1) // key.size(1), [], 0
    for length in lengths:
        for t in range(start, start + length):
            for h in range(query.size(1)):
                scores = key[start : t + 1, h // share] @ query[t, h] / query.size(2) ** 0.5
                outputs.append(scores.softmax(0) @ value[start : t + 1, h // share])
        start += length
    output = torch.stack(outputs).view_as(gradient)
    output.backward(gradient)
    return [output.detach(), *(x.grad for x in (query, key, value))]


def zigzag(lengths: list[int], rank: int, cp: int) -> list[int]:
    """The tokens of the whole pack that `rank` holds, in its order."""
    held, start = [], 0
    for length in lengths:
        chunks = torch.arange(start, start + length).chunk(2 * cp)
        held += [*chunks[rank].tolist(), *chunks[2 * cp - 1 - rank].tolist()]
        start += length
    return held


def cumulative(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()
