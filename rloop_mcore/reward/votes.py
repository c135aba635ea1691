"""What a response votes for in a majority: one text for the spellings of an answer."""

from __future__ import annotations

import re
from decimal import Decimal

from sympy import Expr, Number  # type: ignore[import-untyped]

from rloop_mcore.reward.equations import value_of_equation
from rloop_mcore.reward.equivalence import parse_answer
from rloop_mcore.reward.extract import extract_answer
from rloop_mcore.reward.forms import plain_text
from rloop_mcore.reward.math import LONGEST, equal_texts, grade_answer
from rloop_mcore.reward.reading import Reading, read
from rloop_mcore.reward.restated import value_of_formula
from rloop_mcore.types import Problem

_DECIMALS, _DIGITS = 6, 30
_WORDS = re.compile(r"[a-z'’-]{4,}|[0-9]{1,2}(?::[0-9]{2})?[ap]m")


def vote_math(problem: Problem, response: str, truncated: bool, answer_format: str) -> str:
    """What a response of the verifier named `math` votes for: the normal form of its answer, "" without one.

    A right answer has the gold's: the verifier says that all of those are the same. Of another that is an equation it
    is the value: "x = 7" votes as 7 does.
    """
    answer, reason = extract_answer(response, truncated, answer_format)
    if reason:
        return ""
    if grade_answer(problem, answer).correct:
        return normal_form(problem.answer)
    if len(answer) > LONGEST:
        return answer
    reading = read(value_of_formula(problem.problem, answer) or answer)
    value = value_of_equation(read(problem.answer).text, reading.text, equal_texts)
    return _form(reading if value is None else reading.part(value))


def normal_form(answer: str) -> str:
    """One text for the spellings of an answer, as far as that takes no algebra.

    A number rounded to 6 decimals, as math-verify compares numbers; words without case; other mathematics as SymPy
    prints it, in its order of terms; else the text without spaces. A unit, a percent sign and a base stay with it.
    """
    return answer if len(answer) > LONGEST else _form(read(answer))


def _form(reading: Reading) -> str:
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
