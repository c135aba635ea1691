r"""The math verifier: the extracted answer against the gold answer, compared by math-verify.

math-verify gets only the extracted answer and the gold, each in a `\boxed{}` of its own, so none of its own searching
("the final answer is ...", neighbouring boxes) can pick something else. Its alarm-clock time limits are off: the pool's
deadline is the only one, and a slow answer is a timeout, not a silent False.
"""

from __future__ import annotations

import logging
import re
from decimal import Decimal
from functools import lru_cache
from typing import Any

from latex2sympy2_extended.antlr_parser import PSParser  # type: ignore[import-untyped]
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, Expr, I, MatrixBase, Number  # type: ignore[import-untyped]

from rloop_mcore.reward.extract import extract_answer
from rloop_mcore.types import Problem, Verdict

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off

# Hydra pins the antlr runtime to 4.9.3, and latex2sympy2_extended 1.11's parser for it lacks this one method: without
# it every number with a percent sign is unparsable. It is what the parser for antlr 4.13 has.
if not hasattr(PSParser.AtomContext, "FUNC_GAMMA"):
    PSParser.AtomContext.FUNC_GAMMA = lambda self: self.getToken(PSParser.FUNC_GAMMA, 0)

_EXTRACTION = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
_DECIMALS, _DIGITS = 6, 30
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
_DELIMITERS = [("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**")]
_CURRENCY = re.compile(r"^(-?)(?:\\?\$|[€£¥])\s*(?=\d)|(?<=\d)\s*(?:\\text\{\s*)?dollars?(?:\s*\})?$", re.IGNORECASE)
_SPACED_THOUSANDS = re.compile(r"-?\d{1,3}(?:(?:\s|~|\\[,!;: ])\s*\d{3})+(?:\.\d+)?")
_SEPARATOR = re.compile(r"[\s~]|\\[,!;: ]")
_TEXT_COMMAND = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
# math-verify would drop these as units: 5 million is not 5.
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(rf"(?<=[0-9])\s*(?:\\text\{{)?\s*({'|'.join(_SCALES)})\s*\}}?", re.IGNORECASE)
_WORDS = re.compile(r"[a-z'’-]{4,}|[0-9]{1,2}(?::[0-9]{2})?[ap]m")


def grade_math(problem: Problem, response: str, truncated: bool, answer_format: str) -> Verdict:
    """The verifier named `math`: extract the answer, then compare it with `problem.answer`."""
    answer, reason = extract_answer(response, truncated, answer_format)
    if reason:
        return Verdict(False, reason)
    return compare(problem.answer, answer)


def vote_math(problem: Problem, response: str, truncated: bool, answer_format: str) -> str:
    """What a response of the verifier named `math` votes for: the normal form of its answer, "" without one.

    A right answer has the gold's: the verifier says that all of those are the same.
    """
    answer, reason = extract_answer(response, truncated, answer_format)
    if reason:
        return ""
    right = compare(problem.answer, answer).correct
    return normal_form(problem.answer if right else answer)


def normal_form(answer: str) -> str:
    """One text for the spellings of an answer, as far as that takes no algebra.

    A number rounded to 6 decimals, as math-verify compares numbers; words without case; other mathematics as SymPy
    prints it, in its order of terms; else the text without spaces.
    """
    answer = clean(answer)
    text = _plain_text(answer)
    if _INTEGER.fullmatch(answer) or _WORDS.fullmatch(text):
        return text
    parsed = _parse(answer)
    if not parsed:
        return text
    value = parsed[0].evalf(_DIGITS) if isinstance(parsed[0], Expr) and parsed[0].is_number else None
    if isinstance(value, Number) and abs(value) < 10**_DIGITS:  # to print a larger one may take for ever
        number = f"{Decimal(str(value)):.{_DECIMALS}f}".rstrip("0").rstrip(".")
        return "0" if number == "-0" else number
    return str(parsed[0])


def compare(gold: str, answer: str) -> Verdict:
    """Is `answer` the same mathematical object (or the same text) as `gold`? Not symmetric: math-verify is not.

    The cheap comparisons come first; none of them can contradict the symbolic one on what both understand.
    """
    gold, answer = clean(gold), clean(answer)
    if gold == answer:
        return _verdict(True)
    if _INTEGER.fullmatch(gold) and _INTEGER.fullmatch(answer):
        return _verdict(False)  # both in canonical form, so different strings are different numbers
    gold_text, answer_text = _plain_text(gold), _plain_text(answer)
    if _WORDS.fullmatch(gold_text) and _WORDS.fullmatch(answer_text):
        return _verdict(gold_text == answer_text)  # math-verify takes words for products: "east" would be "seat"
    parsed = _parse(answer)
    if not parsed:
        return Verdict(False, "unparsable")
    return _verdict(verify(list(_parse(gold)), list(parsed), timeout_seconds=None))


def clean(answer: str) -> str:
    """Take off what carries no meaning and what math-verify stumbles over inside a box.

    Math delimiters, bold marks, one final period, currency, and spaces as thousands separators ("1 234" would be read
    as 1 + 234).
    """
    answer = answer.strip()
    before = None
    while answer != before:
        before = answer
        if answer.endswith(".") and not answer.endswith(".."):
            answer = answer[:-1].rstrip()
        for left, right in _DELIMITERS:
            inner = answer[len(left) : len(answer) - len(right)]
            if answer.startswith(left) and answer.endswith(right) and inner.strip() and left not in inner:
                answer = inner.strip()
    answer = _CURRENCY.sub(r"\1", answer)
    if _SPACED_THOUSANDS.fullmatch(answer):
        answer = _SEPARATOR.sub("", answer)
    return answer


def _verdict(correct: bool) -> Verdict:
    return Verdict(correct, "correct" if correct else "wrong")


def _plain_text(answer: str) -> str:
    """The words of a text answer: no text commands, spaces or periods, lower case."""
    return re.sub(r"\\ |[\s.~]", "", _TEXT_COMMAND.sub(r"\1", answer)).casefold()


@lru_cache(maxsize=1024)
def _parse(answer: str) -> tuple[Any, ...]:
    """The SymPy objects of an answer; empty if it is not mathematics that math-verify understands."""
    answer = _SCALE.sub(lambda scale: rf"\cdot 10^{{{_SCALES[scale[1].lower()]}}} ", answer)
    found = parse("\\boxed{" + answer + "}", _EXTRACTION, parsing_timeout=None)
    return tuple(_with_imaginary_unit(item) for item in found if isinstance(item, (Basic, MatrixBase)))


def _with_imaginary_unit(item: Any) -> Any:
    """math-verify reads i as a variable: to it (1+i)^2 is not 2i."""
    variables = [symbol for symbol in item.free_symbols if symbol.name == "i"]
    return item.subs(dict.fromkeys(variables, I)) if variables else item
