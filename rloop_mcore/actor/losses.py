"""What Megatron's schedule minimises: sums over the response tokens of a micro-batch.

Megatron adds the sums and the token counts of all micro-batches and data-parallel ranks and divides the gradient by the
total count (`calculate_per_token_loss`), so the gradient is that of the token mean over the global mini-batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from rloop_mcore.actor.batching import MicroBatch
from rloop_mcore.actor.logprobs import token_logprobs
from rloop_mcore.actor.metrics import MetricNames
from rloop_mcore.algorithm.clip import policy_loss

DAPO_METRICS = MetricNames(
    sums=("loss", "tokens", "entropy", "clip_fraction", "ratio_mean", "mismatch_mean"),
    maxima=("ratio_max", "mismatch_max"),
)
FINE_TUNING_METRICS = MetricNames(sums=("loss", "tokens"))

# logits [batch, seq, vocabulary / tp] -> (loss summed over tokens, number of tokens, report in the order of the names)
LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def dapo_loss(
    batch: MicroBatch, vocabulary: int, temperature: float, clip_low: float, clip_high: float, dual_clip: float
) -> LossFunction:
    """DAPO's token-level policy loss (arXiv 2503.14476, eq. 12) against the behaviour policy's logprobs."""

    def loss(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mask = batch.mask
        logprobs, entropy = token_logprobs(logits[mask], batch.targets[mask], vocabulary, temperature)
        old = batch.old_logprobs[mask]
        per_token, clipped = policy_loss(logprobs, old, batch.advantages[mask], clip_low, clip_high, dual_clip)
        total, tokens = per_token.sum(), mask.sum(dtype=torch.int)
        difference = logprobs.detach() - old
        ratio, mismatch = difference.exp(), difference.abs()
        sums = [total.detach(), tokens, entropy.sum(), clipped.sum(), ratio.sum(), mismatch.sum()]
        return total, tokens, torch.stack([*sums, _maximum(ratio), _maximum(mismatch)])

    return loss


def fine_tuning_loss(batch: MicroBatch, vocabulary: int) -> LossFunction:
    """The negative log-likelihood of the response tokens."""

    def loss(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mask = batch.mask
        logprobs, _ = token_logprobs(logits[mask], batch.targets[mask], vocabulary, 1.0)
        total, tokens = -logprobs.sum(), mask.sum(dtype=torch.int)
        return total, tokens, torch.stack([total.detach(), tokens])

    return loss


def _maximum(values: torch.Tensor) -> torch.Tensor:
    return values.max() if values.numel() else values.new_zeros(())
