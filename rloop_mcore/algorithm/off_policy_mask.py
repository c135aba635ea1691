"""Which sequences have drifted too far from the policy that sampled them to be pushed down."""

from __future__ import annotations

import torch


def keep_sequences(mean_log_ratio: torch.Tensor, advantages: torch.Tensor, delta: float) -> torch.Tensor:
    """DeepSeek-V3.2's off-policy sequence masking (arXiv 2512.02556, section 3.1).

    Dropped is a sequence with A < 0 and (1 / length) * sum_t log(pi_old / pi) > delta: a bad response that the policy
    hardly gives any more teaches nothing and destabilises. Sequences with A >= 0 always stay.

    Args:
        mean_log_ratio: [sequences], the mean over all tokens of a sequence of log pi_old - log pi, where pi_old is what
            the engine reported, so that both the updates since and the engine's other numerics count.
        advantages: [sequences].
        delta: the largest mean that stays, in nats a token.

    Returns:
        [sequences] (bool), true for what stays in the policy loss.
    """
    return (advantages >= 0) | (mean_log_ratio <= delta)
