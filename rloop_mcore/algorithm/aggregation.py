"""How the losses of tokens become one number: a weight for each sequence.

Megatron sums the losses of all tokens, micro-batches and ranks and divides the gradient by the number of tokens N. With
these weights that division gives any of the usual means over the global mini-batch, whatever the layout:

    loss = (1 / N) * sum_i weight_i * sum_t loss_it,    N = sum(lengths)
"""

from __future__ import annotations

from collections.abc import Sequence


def sequence_weights(lengths: Sequence[int], kind: str, max_tokens: int) -> list[float]:
    """The weight [sequences] of each sequence of a global mini-batch.

    With S the number of sequences that have tokens in the loss:

    - `token_mean`: 1. The mean over all tokens (DAPO, arXiv 2503.14476, eq. 12).
    - `sequence_mean`: N / (S * length). The mean over sequences of the mean over tokens (GRPO, arXiv 2402.03300).
    - `dr_grpo`: N / (S * max_tokens). The mean over sequences of the sum over tokens, by a constant (Dr. GRPO, arXiv
      2503.20783), so that what a token weighs depends on no length at all.

    Args:
        lengths: response tokens of each sequence that enter the loss; 0 for one that is left out, which has weight 0.
        kind: one of the above; ValueError for another.
        max_tokens: the most tokens a response can have; `dr_grpo` only.
    """
    tokens, sequences = sum(lengths), _count(lengths)
    match kind:
        case "token_mean":
            return [1.0 if length else 0.0 for length in lengths]
        case "sequence_mean":
            return [tokens / (sequences * length) if length else 0.0 for length in lengths]
        case "dr_grpo":
            return [tokens / (sequences * max_tokens) if length else 0.0 for length in lengths]
        case _:
            raise ValueError(f"unknown aggregation {kind!r}")


def trajectory_weights(lengths: Sequence[int], rewards: Sequence[float]) -> list[float]:
    """The weights [sequences] that make the token losses -log pi(token) RLoop's eq. 6 (arXiv 2511.04285).

    J = (1 / S) * sum_i R_i * log pi(trajectory_i), where log pi(trajectory) is the sum over its tokens: R_i * N / S.
    """
    tokens, sequences = sum(lengths), _count(lengths)
    return [reward * tokens / sequences if length else 0.0 for length, reward in zip(lengths, rewards, strict=True)]


def _count(lengths: Sequence[int]) -> int:
    return sum(length > 0 for length in lengths)
