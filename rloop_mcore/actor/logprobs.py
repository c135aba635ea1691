"""Logprobs and entropy of tokens from hidden states, without ever holding the logits of all of them.

The vocabulary is split over the tensor-parallel ranks and the tokens are taken chunk by chunk; the backward pass
computes a chunk's logits again. That costs a third more of the output layer's arithmetic and saves memory of tokens x
vocabulary in fp32, several times over. Logits that are few are kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from rloop_mcore.platform import CHUNK_LOGITS, KEPT_LOGITS
from rloop_mcore.platform.kernels import add_product, fused, product

_NEVER = -1e30  # logit of a padding row of the vocabulary: finite, so that 0 * logit stays 0 in the entropy


def token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    vocabulary: int,
    temperature: float,
    group: dist.ProcessGroup,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(target) and the entropy of p = softmax(hidden @ weight.T / temperature), in nats, both [tokens] in fp32.

    `hidden` [tokens, hidden], the same on all ranks of the tensor-parallel `group`; `weight` [padded vocabulary / tp,
    hidden] is this rank's shard; `targets` [tokens] are global ids; `vocabulary` is the true size, without padding.
    Both results are differentiable; the gradient of `hidden` is this rank's part of a sum over the group.
    """
    first = weight.size(0) * group.rank()
    return _TokenLogprobs.apply(hidden, weight, targets - first, vocabulary - first, 1.0 / temperature, group)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        rows: int,
        scale: float,
        group: dist.ProcessGroup,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`targets` count from this shard's first row, of which the first `rows` are no padding."""
        ctx.set_materialize_grads(False)  # most losses only report the entropy
        tokens = hidden.size(0)
        maximum, partition, weighted, target = hidden.new_zeros(4, tokens, dtype=torch.float32).unbind()
        keep = tokens * weight.size(0) <= KEPT_LOGITS
        ctx.logits = None
        for part in _chunks(tokens, weight.size(0), hidden.device):
            logits = _logits(hidden[part], weight, rows, scale)
            index, mine = _local(targets[part], weight.size(0))
            target[part] = (logits.gather(-1, index) * mine).squeeze(-1)
            if keep:
                ctx.logits = logits
            scratch = None if keep or logits.is_cuda else logits
            maximum[part], partition[part], weighted[part] = _statistics(logits, scratch)
        if group.size() > 1:
            maximum, partition, weighted, target = _over_the_vocabulary(maximum, partition, weighted, target, group)
        normaliser = maximum + partition.log()
        entropy = partition.log() - weighted / partition
        ctx.save_for_backward(hidden, weight, targets, normaliser, entropy)
        ctx.rows, ctx.scale = rows, scale
        return target - normaliser, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """d log p(t) / d logit_j = [j = t] - p_j and d H / d logit_j = -p_j (log p_j + H)."""
        hidden, weight, targets, normaliser, entropy = ctx.saved_tensors
        normaliser, entropy = normaliser.unsqueeze(-1), entropy.unsqueeze(-1)
        of_logprobs, of_entropy = (None if g is None else g.unsqueeze(-1) * ctx.scale for g in gradients)
        if of_logprobs is None:
            of_logprobs = torch.zeros_like(normaliser)
        of_hidden = torch.empty_like(hidden)
        of_weight = torch.zeros_like(weight, dtype=torch.float32)
        kept, ctx.logits = ctx.logits, None  # they are overwritten
        for part in _chunks(hidden.size(0), weight.size(0), hidden.device):
            logits = _logits(hidden[part], weight, ctx.rows, ctx.scale) if kept is None else kept
            index, mine = _local(targets[part], weight.size(0))
            own = normaliser[part], entropy[part], of_logprobs[part], None if of_entropy is None else of_entropy[part]
            of_target = _gradient(logits.gather(-1, index), *own, torch.float32, None) + of_logprobs[part]
            of_logits = _of_logits(logits, *own, weight.dtype, None if logits.is_cuda else logits)
            of_target = of_target.to(weight.dtype).where(mine, of_logits.gather(-1, index))
            of_logits.scatter_(-1, index, of_target)
            torch.mm(of_logits, weight, out=of_hidden[part])
            add_product(of_weight, of_logits.T, hidden[part])
        return of_hidden, of_weight.to(weight.dtype), None, None, None, None


@fused
def _statistics(logits: torch.Tensor, scratch: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each row: its greatest logit m, the sum of exp(x - m) and that of (x - m) exp(x - m).

    `scratch`: memory to overwrite, that of `logits` where it is not needed any more; None takes new memory.
    """
    maximum = logits.amax(-1)
    shifted = logits - maximum.unsqueeze(-1)
    exponentials = torch.exp(shifted, out=scratch)
    return maximum, exponentials.sum(-1), shifted.mul_(exponentials).sum(-1)


def _gradient(
    logits: torch.Tensor,
    normaliser: torch.Tensor,
    entropy: torch.Tensor,
    of_logprobs: torch.Tensor,
    of_entropy: torch.Tensor | None,
    dtype: torch.dtype,
    scratch: torch.Tensor | None,
) -> torch.Tensor:
    """-g1 p - g2 p (log p + H), elementwise: the gradient of the logits, but for g1 at the target."""
    logprobs = torch.sub(logits, normaliser, out=scratch)
    if of_entropy is None:
        return logprobs.exp_().mul_(-of_logprobs).to(dtype)
    probabilities = logprobs.exp()
    return logprobs.add_(entropy).mul_(of_entropy).add_(of_logprobs).mul_(probabilities).neg_().to(dtype)


_of_logits = fused(_gradient)


def _chunks(tokens: int, vocabulary: int, device: torch.device) -> list[slice]:
    size = tokens if tokens * vocabulary <= KEPT_LOGITS else max(1, CHUNK_LOGITS[device.type] // vocabulary)
    return [slice(start, start + size) for start in range(0, tokens, max(1, size))]


def _logits(hidden: torch.Tensor, weight: torch.Tensor, rows: int, scale: float) -> torch.Tensor:
    """[chunk, vocabulary / tp] in fp32, a tensor of its own."""
    logits = product(hidden, weight.T)
    if scale != 1.0:
        logits *= scale
    if rows < weight.size(0):
        logits[:, max(rows, 0) :] = _NEVER
    return logits


def _local(targets: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns [tokens, 1] to gather from this shard, and [tokens, 1] where they are meant."""
    mine = (targets >= 0) & (targets < size)
    return targets.where(mine, 0).unsqueeze(-1), mine.unsqueeze(-1)


def _over_the_vocabulary(
    maximum: torch.Tensor,
    partition: torch.Tensor,
    weighted: torch.Tensor,
    target: torch.Tensor,
    group: dist.ProcessGroup,
) -> tuple[torch.Tensor, ...]:
    """The softmax's statistics of every rank's shard, put together: two all-reduces for all tokens."""
    highest = maximum.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX, group)
    shift = maximum - highest
    factor = shift.exp()
    sums = torch.stack([partition * factor, (weighted + shift * partition) * factor, target])
    dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    return highest, *sums.unbind()
