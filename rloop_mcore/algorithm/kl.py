"""Estimates of the KL divergence from a reference policy, one token at a time."""

from __future__ import annotations

import torch

from rloop_mcore.algorithm.clip import LOG_RATIO_LIMIT


def kl_estimate(logprobs: torch.Tensor, reference: torch.Tensor, kind: str) -> torch.Tensor:
    """J. Schulman's estimates of KL(pi || ref) from sampled tokens ("Approximating KL Divergence", 2020).

    With d = log pi - log ref of a token drawn from pi:

    - `k1` = d: unbiased.
    - `k2` = d^2 / 2: biased, never negative.
    - `k3` = exp(-d) - 1 + d: unbiased, never negative.

    In the loss it is the gradient that counts, and that of an estimate is not an estimate of the gradient (arXiv
    2506.09477). For tokens drawn from pi itself, given the tokens before them, its expectation is

    - `k1`: 0, so it adds noise and regularises nothing;
    - `k2`: the gradient of KL(pi || ref);
    - `k3`: the gradient of KL(ref || pi), the other direction; both agree to first order where pi is near ref.

    After the first update of a step the tokens come from an older policy, and these hold approximately.

    Args:
        logprobs: of the policy in training, any shape, with gradient.
        reference: of the reference policy, same shape, constants.
        kind: k1, k2 or k3; ValueError for another.

    Returns:
        The estimate of each token, same shape. Where the reference is more than e^20 times as likely, k3 is constant,
        so that neither it nor its gradient overflows.
    """
    difference = logprobs - reference
    match kind:
        case "k1":
            return difference
        case "k2":
            return 0.5 * difference.square()
        case "k3":
            limited = (-difference).clamp(max=LOG_RATIO_LIMIT)
            return torch.expm1(limited) - limited
        case _:
            raise ValueError(f"unknown KL estimator {kind!r}")
