"""What a response votes for in a majority: one text for the spellings of an answer."""

from __future__ import annotations

import re
from decimal import Decimal

from sympy import Expr, Number  # type: ignore[import-untyped]

from rloop_mcore.reward.equivalence import parse_answer
from rloop_mcore.reward.extract import extract_answer
from rloop_mcore.reward.forms import plain_text
from rloop_mcore.reward.math import LONGEST, grade_answer
from rloop_mcore.reward.reading import read
from rloop_mcore.types import Problem

_DECIMALS, _DIGITS = 6, 30
_WORDS = re.compile(r"[a-z'’-]{4,}|[0-9]{1,2}(?::[0-9]{2})?[ap]m")


def vote_math(problem: Problem, response: str, truncated: bool, answer_format: str) -> str:
    """What a response of the verifier named `math` votes for: the normal form of its answer, "" without one.

    A right answer has the gold's: the verifier says that all of those are the same.
    """
    answer, reason = extract_answer(response, truncated, answer_format)
    if reason:
        return ""
    right = grade_answer(problem, answer).correct
    return normal_form(problem.answer if right else answer)


def normal_form(answer: str) -> str:
    """One text for the spellings of an answer, as far as that takes no algebra.

    A number rounded to 6 decimals, as math-verify compares numbers; words without case; other mathematics as SymPy
    prints it, in its order of terms; else the text without spaces. A unit, a percent sign and a base stay with it.
    """
    if len(answer) > LONGEST:
        return answer
    reading = read(answer)
    value = plain_text(reading.text)
    if not _WORDS.fullmatch(value) and reading.readable and (parsed := parse_answer(reading.text)):
        value = _printed(parsed[0])
    return value + (f"%{reading.unit}" if reading.percent else reading.unit) + (f"_{reading.base}" * bool(reading.base))


def _printed(item: object) -> str:
    value = item.evalf(_DIGITS) if isinstance(item, Expr) and item.is_number else None
    if isinstance(value, Number) and abs(value) < 10**_DIGITS:  # to print a larger one may take for ever
        number = f"{Decimal(str(value)):.{_DECIMALS}f}".rstrip("0").rstrip(".")
        return "0" if number == "-0" else number
    return str(item)
