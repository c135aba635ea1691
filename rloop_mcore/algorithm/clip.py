"""The clipped policy loss of one token: PPO's, with DAPO's higher upper bound and the dual clip."""

from __future__ import annotations

import torch

LOG_RATIO_LIMIT = 20.0  # exp(20) is beyond any clip; without a limit exp overflows and 0 * inf makes the gradient NaN


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token loss (to be minimised) and the mask of the tokens whose gradient the clipping removes.

    With the importance ratio r = exp(logprobs - old_logprobs), DAPO's clip-higher (arXiv 2503.14476, eq. 10):

        loss = -min(r * A, clip(r, 1 - clip_low, 1 + clip_high) * A)

    and for A < 0 the dual clip (arXiv 1912.09729), which bounds what one very off-policy token can push:

        loss = min(loss, -dual_clip * A)

    DAPO averages this over all response tokens of the batch (eq. 12, token-level loss); summing and dividing are the
    caller's, who knows the mask and the other ranks.

    Args:
        logprobs: of the policy in training, any shape, with gradient.
        old_logprobs: of the behaviour policy, same shape, constants.
        advantages: broadcastable to that shape.
        clip_low: lower clip distance, 0.2 in DAPO.
        clip_high: upper clip distance, 0.28 in DAPO.
        dual_clip: bound on the ratio where A < 0, greater than 1 (DAPO's scripts: 10); 0 switches it off.

    Returns:
        loss and clipped (bool), same shape. Where `clipped`, the loss is constant in `logprobs`.
    """
    ratio = torch.exp((logprobs - old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    unclipped_loss = -advantages * ratio
    clipped_loss = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = torch.maximum(unclipped_loss, clipped_loss)
    clipped = clipped_loss > unclipped_loss
    if dual_clip > 0:
        bound = -advantages * dual_clip
        beyond = (advantages < 0) & (loss > bound)
        loss = torch.where(beyond, bound, loss)
        clipped = clipped | beyond
    return loss, clipped
