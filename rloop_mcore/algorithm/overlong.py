"""DAPO's soft overlong punishment."""

from __future__ import annotations


def overlong_penalty(length: int, max_tokens: int, buffer: int) -> float:
    """What a response of `length` tokens loses, from 0 to -1 (DAPO, arXiv 2503.14476, eq. 13).

    0 up to max_tokens - buffer, then falling linearly to -1 at max_tokens. A buffer of 0 switches it off.
    """
    if buffer == 0:
        return 0.0
    excess = length - (max_tokens - buffer)
    return -min(max(excess / buffer, 0.0), 1.0)
