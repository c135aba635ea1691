"""Verifier of the quickstart's task: reach a target with every given number used once, step by step.

The response reads `3 * 5 = 15 , 15 + 8 = 23 , 23 - 2 = 21`, spaces free. `problem.meta` has `numbers` and `target`.
"""

from __future__ import annotations

import re

from rloop_mcore.types import Problem, Verdict

LARGEST = 40  # intermediates stay within 0..40

_STEP = re.compile(r"\s*([0-9]{1,4})\s*([-+*])\s*([0-9]{1,4})\s*=\s*(-?\s*[0-9]{1,4})\s*")
_OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def grade_countdown(problem: Problem, response: str, truncated: bool, answer_format: str) -> Verdict:
    """The verifier named `countdown`. The task fixes its own format, so `answer_format` is not used.

    Every step must be right and use numbers still available (given ones or results, each once); in the end the
    target alone is left.
    """
    if not response.strip():
        return Verdict(False, "truncated" if truncated else "no_answer")
    steps = [_STEP.fullmatch(step) for step in response.split(",")]
    available = list(problem.meta["numbers"])
    for step in steps:
        if step is None:
            return Verdict(False, "truncated" if truncated else "unparsable")
        left, right, result = int(step[1]), int(step[3]), int(step[4].replace(" ", ""))
        if _OPERATIONS[step[2]](left, right) != result or not 0 <= result <= LARGEST:
            return Verdict(False, "wrong")
        for operand in (left, right):
            if operand not in available:
                return Verdict(False, "wrong")
            available.remove(operand)
        available.append(result)
    if available == [problem.meta["target"]]:
        return Verdict(True, "correct")
    return Verdict(False, "truncated" if truncated and len(available) > 1 else "wrong")


def vote_countdown(problem: Problem, response: str, truncated: bool, answer_format: str) -> str:
    """What a response votes for: its steps without spaces, "" where it was cut. A problem has many right solutions."""
    return "" if truncated else re.sub(r"\s", "", response)
