"""Correcting for an engine that samples from slightly other probabilities than the trainer computes."""

from __future__ import annotations

import torch


def importance_weights(trainer: torch.Tensor, engine: torch.Tensor, kind: str, cap: float) -> torch.Tensor:
    """What each token's policy loss is multiplied by: a constant, no gradient flows through it.

    With the ratio rho = exp(trainer - engine), where with `rollout.max_lag` the engine's weights are older ones:

    - `truncate`: min(rho, cap). Truncated importance sampling (Yao et al., "Your Efficient RL Framework Secretly Brings
      You Off-Policy RL Training", 2025).
    - `mask`: rho within [1 / cap, cap], otherwise 0. IcePop (arXiv 2510.18855), whose bounds are two free numbers.

    Args:
        trainer: the trainer's logprobs at the start of the step, any shape.
        engine: the logprobs the engine reported, same shape.
        kind: one of the above; ValueError for another.
        cap: C, at least 1.

    Returns:
        Weights in [0, cap], same shape.
    """
    with torch.no_grad():
        ratio = torch.exp(trainer - engine)
        match kind:
            case "truncate":
                return ratio.clamp(max=cap)
            case "mask":
                return torch.where((ratio >= 1.0 / cap) & (ratio <= cap), ratio, 0.0)
            case _:
                raise ValueError(f"unknown importance weight {kind!r}")
