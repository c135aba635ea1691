"""A verifier for models that have learnt nothing; imported by the reward workers, which need no torch."""

import hashlib

from rloop_mcore.types import Problem


def toss(problem: Problem, response: str, truncated: bool, answer_format: str) -> tuple[bool, str]:
    """A verdict that half of an untrained model's responses get: every group has something to learn from."""
    correct = hashlib.sha256(response.encode()).digest()[0] % 2 == 0
    return correct, "correct" if correct else "wrong"
