"""Verifiers that need no mathematics: the same text, and the same letter of a multiple choice."""

from __future__ import annotations

import re

from rloop_mcore.reward.extract import extract_answer
from rloop_mcore.types import Problem, Verdict

_CHOICE = re.compile(r"(?:\\(?:text|mathrm|mathbf|textbf)\s*\{)?\s*\(?\s*([A-Za-z])\s*\)?\s*\}?\s*[.:)]?")


def grade_exact(problem: Problem, response: str, truncated: bool, answer_format: str) -> Verdict:
    """The verifier named `exact`: the extracted answer is the gold, runs of white space taken for one space."""
    answer, reason = extract_answer(response, truncated, answer_format)
    if reason:
        return Verdict(False, reason)
    correct = answer.split() == problem.answer.split()
    return Verdict(correct, "correct" if correct else "wrong")


def grade_choice(problem: Problem, response: str, truncated: bool, answer_format: str) -> Verdict:
    """The verifier named `choice`: C, (C), c. or \\text{(C)} for a gold C; anything but one letter is unparsable."""
    answer, reason = extract_answer(response, truncated, answer_format)
    if reason:
        return Verdict(False, reason)
    gold, chosen = _CHOICE.fullmatch(problem.answer.strip()), _CHOICE.fullmatch(answer)
    if gold is None:
        raise ValueError(f"problem {problem.id}: the gold answer {problem.answer!r} is no letter of a choice")
    if chosen is None:
        return Verdict(False, "unparsable")
    correct = chosen[1].upper() == gold[1].upper()
    return Verdict(correct, "correct" if correct else "wrong")
