"""What Megatron's schedule minimises: weighted sums over the response tokens of a micro-batch.

Megatron adds the sums and the token counts of all micro-batches, data- and context-parallel ranks and divides the
gradient by the total count N (`calculate_per_token_loss`). A token's weight makes of that token mean whatever
`algorithm.aggregation` asks for, over the global mini-batch whatever the layout.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from rloop_mcore.actor.metrics import Report
from rloop_mcore.actor.packing import MicroBatch
from rloop_mcore.algorithm.clip import policy_loss
from rloop_mcore.algorithm.importance import importance_weights
from rloop_mcore.algorithm.kl import kl_estimate
from rloop_mcore.algorithm.off_policy_mask import keep_sequences
from rloop_mcore.config import AlgorithmConfig

# (micro-batch, logprobs [n], entropy [n]) -> (loss summed over the n response tokens, what to report)
Loss = Callable[[MicroBatch, torch.Tensor, torch.Tensor], tuple[torch.Tensor, Report]]


def policy_update_loss(config: AlgorithmConfig, context_group: dist.ProcessGroup) -> Loss:
    """DAPO's policy loss (arXiv 2503.14476, eq. 12) with the options of docs/algorithm.md."""

    def loss(batch: MicroBatch, logprobs: torch.Tensor, entropy: torch.Tensor) -> tuple[torch.Tensor, Report]:
        old, engine = batch.old_logprobs, batch.engine_logprobs
        per_token, clipped = policy_loss(
            logprobs, old, batch.advantages, config.clip_low, config.clip_high, config.dual_clip
        )
        ratio, mismatch = (logprobs.detach() - old).exp(), (logprobs.detach() - engine).abs()
        sums = {"entropy": entropy, "clip_fraction": clipped, "ratio_mean": ratio, "mismatch_mean": mismatch}
        sums["mismatch_k3"] = kl_estimate(engine, logprobs.detach(), "k3")
        if config.importance != "none":
            importance = importance_weights(old, engine, config.importance, config.importance_cap)
            per_token = per_token * importance
            sums["importance_mean"] = importance
        if config.off_policy_mask > 0:
            kept = _of_kept_sequences(batch, logprobs.detach(), config.off_policy_mask, context_group)
            per_token = per_token * kept
            sums["off_policy_kept"] = kept
        if config.kl_coefficient > 0:
            divergence = kl_estimate(logprobs, batch.reference_logprobs, config.kl_estimator)
            per_token = per_token + config.kl_coefficient * divergence
            sums["kl"] = divergence
        if config.entropy_coefficient > 0:
            per_token = per_token - config.entropy_coefficient * entropy
        total = (per_token * batch.weights).sum()
        return total, Report.of(
            sums | {"loss": per_token * batch.weights}, {"ratio_max": ratio, "mismatch_max": mismatch}
        )

    return loss


def fine_tuning_loss(batch: MicroBatch, logprobs: torch.Tensor, entropy: torch.Tensor) -> tuple[torch.Tensor, Report]:
    """The negative log-likelihood of the response tokens, weighted."""
    per_token = -logprobs * batch.weights
    return per_token.sum(), Report.of({"loss": per_token}, {})


def _of_kept_sequences(
    batch: MicroBatch, logprobs: torch.Tensor, limit: float, context_group: dist.ProcessGroup
) -> torch.Tensor:
    """1.0 for the tokens of the sequences that the off-policy mask keeps; a sequence may lie on several ranks."""
    statistics = logprobs.new_zeros(3, len(batch.lengths))
    columns = torch.stack([batch.engine_logprobs - logprobs, batch.advantages, torch.ones_like(logprobs)])
    statistics.index_add_(1, batch.sequences, columns)
    if context_group.size() > 1:
        dist.all_reduce(statistics, group=context_group)
    log_ratio, advantage, count = statistics
    count = count.clamp(min=1.0)
    return keep_sequences(log_ratio / count, advantage / count, limit)[batch.sequences].to(logprobs.dtype)
