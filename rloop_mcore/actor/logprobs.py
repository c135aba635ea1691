"""Logprobs and entropy of tokens from logits whose vocabulary is split over the tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

_NEVER = -1e30  # logit of a padding row of the vocabulary: finite, so that 0 * logit stays 0 in the entropy


def token_logprobs(
    logits: torch.Tensor, targets: torch.Tensor, vocabulary: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(target) and the entropy of p = softmax(logits / temperature), in nats, both [tokens] in fp32.

    `logits` [tokens, padded vocabulary / tp] is this rank's shard; `targets` [tokens] are global ids; `vocabulary` is
    the true size, without padding. The logprobs are differentiable, the entropy is not.
    """
    shard = logits.size(-1)
    first = shard * parallel_state.get_tensor_model_parallel_rank()
    logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    if first + shard > vocabulary:
        padding = torch.arange(first, first + shard, device=logits.device) >= vocabulary
        logits = logits.masked_fill(padding, _NEVER)
    return _TokenLogprobs.apply(logits, targets - first, parallel_state.get_tensor_model_parallel_group())


class _TokenLogprobs(torch.autograd.Function):
    """One pass over the sharded softmax: two all-reduces forward, none backward."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, local_targets: torch.Tensor, group: dist.ProcessGroup
    ) -> tuple[torch.Tensor, torch.Tensor]:
        split = group.size() > 1
        maximum = logits.amax(-1)
        if split:
            dist.all_reduce(maximum, dist.ReduceOp.MAX, group)
        shifted = logits - maximum.unsqueeze(-1)
        exponentials = shifted.exp()
        mine = (local_targets >= 0) & (local_targets < logits.size(-1))
        index = local_targets.where(mine, 0).unsqueeze(-1)
        target = shifted.gather(-1, index).squeeze(-1) * mine
        sums = torch.stack([exponentials.sum(-1), (exponentials * shifted).sum(-1), target])
        if split:
            dist.all_reduce(sums, dist.ReduceOp.SUM, group)
        partition, weighted, target = sums
        ctx.save_for_backward(exponentials.div_(partition.unsqueeze(-1)), index, mine)
        entropy = partition.log() - weighted / partition
        ctx.mark_non_differentiable(entropy)
        return target - partition.log(), entropy

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        probabilities, index, mine = ctx.saved_tensors
        gradient = gradients[0].unsqueeze(-1)
        return (probabilities * -gradient).scatter_add(-1, index, gradient * mine.unsqueeze(-1)), None, None
