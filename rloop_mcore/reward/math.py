r"""The math verifier: the extracted answer against the gold answer, compared by math-verify where text does not decide.

math-verify gets only what was extracted and read (`reading.py`), in a `\boxed{}` of its own, so none of its own
searching ("the final answer is ...", neighbouring boxes, units) can pick something else. Its alarm-clock limits are
off: the pool's deadline is the only one, and a slow answer is a timeout, not a silent False. Its mistakes that would
call a wrong answer correct are caught before it (`forms.py`) or made impossible (`equivalence.py`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import lru_cache

from sympy import Rational  # type: ignore[import-untyped]

from rloop_mcore.reward.equations import value_of_equation
from rloop_mcore.reward.equivalence import as_tuple, equivalent, is_one_value, parse_answer
from rloop_mcore.reward.extract import extract_answer, last_box
from rloop_mcore.reward.forms import (
    cases_apart,
    conflict,
    entries,
    in_letters_of,
    is_tuple,
    same_text,
)
from rloop_mcore.reward.numbers import exact, same_number
from rloop_mcore.reward.reading import Reading, read, without_spaces
from rloop_mcore.reward.restated import restates, value_of_formula
from rloop_mcore.reward.systems import same_values
from rloop_mcore.types import Problem, Verdict

CORRECT, WRONG, UNPARSABLE = Verdict(True, "correct"), Verdict(False, "wrong"), Verdict(False, "unparsable")

LONGEST = 1000  # characters that an answer may have beyond twice the gold's: what is longer is no answer


def grade_math(problem: Problem, response: str, truncated: bool, answer_format: str) -> Verdict:
    """The verifier named `math`: extract the answer, then compare it with `problem.answer`."""
    answer, reason = extract_answer(response, truncated, answer_format)
    return Verdict(False, reason) if reason else grade_answer(problem, answer)


def grade_answer(problem: Problem, answer: str) -> Verdict:
    """`compare` with the gold, knowing the problem: "x^2 = 5" says 5 where that has x^2 by itself; and a formula of it
    that is still to be worked out is wrong, whatever its value.
    """
    verdict = compare(problem.answer, answer)
    if not verdict.correct and (value := value_of_formula(problem.problem, answer)):
        verdict = compare(problem.answer, value)

    def right(formula: str) -> bool:
        return compare(problem.answer, formula).correct

    gold = last_box(problem.answer) or problem.answer
    return WRONG if verdict.correct and restates(problem.problem, gold, answer, right) else verdict


def verify_gold(problem: Problem, response: str, truncated: bool, answer_format: str) -> Verdict:
    """A verifier of the pool's kind: the gold, or the box in it, against itself (`golds.py`)."""
    return compare_symbolically(problem.answer, last_box(problem.answer) or problem.answer)


@lru_cache(maxsize=4096)
def compare(gold: str, answer: str) -> Verdict:
    """Is `answer` the same mathematical object (or the same text) as `gold`? Not symmetric: the gold sets the form.

    Of a gold that is a sentence with a box, the box is the gold. The cheap comparisons come first; they never
    contradict `compare_symbolically`.
    """
    if len(answer) > LONGEST + 2 * len(gold):
        return UNPARSABLE
    read_gold, read_answer = read(last_box(gold) or gold), read(answer)
    if without_spaces(read_gold) == without_spaces(read_answer) and read_gold.text:
        return CORRECT
    quick = same_number(read_gold, read_answer)
    return compare_symbolically(gold, answer) if quick is None else _verdict(quick)


def compare_symbolically(gold: str, answer: str) -> Verdict:
    """`compare` without its short cuts."""
    read_gold, read_answer = read(last_box(gold) or gold), read(answer)
    if read_gold.choice and read_answer.choice and read_gold.choice != read_answer.choice:
        return WRONG
    text = same_text(read_gold.text, read_answer.text)
    if text is False or (text and replace(read_gold, text=read_answer.text, choice=read_answer.choice) == read_answer):
        return _verdict(text)
    value = value_of_equation(read_gold.text, read_answer.text, equal_texts)
    if value is not None and r"\approx" not in read_gold.text:
        value = _rounded(read_gold.text, value)
    if value is None:
        return WRONG
    same = same_values(read_gold, read_answer, lambda one, other: compare(one, other).correct)
    if same is not None:
        return _verdict(same)
    read_answer = read_answer.part(value)
    if conflict(read_gold, read_answer):
        return WRONG
    if not read_answer.readable:
        return UNPARSABLE
    verdict = UNPARSABLE
    for named in in_letters_of(read_gold.text, read_answer.text):
        gold, answer = cases_apart(read_gold.text, named)
        if parse_answer(answer):
            verdict = _verdict(_equal_with_percent(replace(read_gold, text=gold), replace(read_answer, text=answer)))
        if verdict.correct:
            break
    return verdict


def _rounded(gold: str, answer: str) -> str | None:
    r"""What "\frac{10}{3} \approx 3.33" says the value is: 3.33 for a decimal gold, else 10/3; None if not near.

    To a decimal gold "\approx 3.33" and "x \approx 3.33" say so too, to another they say nothing. An answer that is not
    a number and its rounding comes back as it is.
    """
    exactly, sign, decimal = (part.strip() for part in answer.partition(r"\approx"))
    decimal_gold = "." in gold and exact(gold) is not None
    if sign and (not exactly or exactly.isalpha()):
        return decimal if decimal_gold else None
    value, rounded = parse_answer(exactly) if exactly else (), exact(decimal)
    if not is_one_value(value) or not value[0].is_number or rounded is None:
        return answer
    last_place = 10.0 ** -len(decimal.partition(".")[2])
    if not abs(value[0] - Rational(rounded)).evalf() < last_place:
        return None
    return decimal if decimal_gold else exactly


def _equal_with_percent(gold: Reading, answer: Reading) -> bool:
    """50 % is 0.5, and stands for 50 too; but 0.5 % is never 0.5."""
    if gold.percent == answer.percent:
        return equal_texts(gold.text, answer.text)
    percent, plain = (gold.text, answer.text) if gold.percent else (answer.text, gold.text)
    (name, _, plain), (other, _, percent) = (side.rpartition("=") for side in (plain, percent))
    if name.strip() != other.strip() and name and other:
        return False
    values = list(map(exact, entries(gold.text)))
    if all(value is not None and abs(value) > 1 for value in values) and equal_texts(gold.text, answer.text):
        return True
    return equal_texts(plain, rf"\frac{{{percent}}}{{100}}")


def equal_texts(gold: str, answer: str) -> bool:
    """Are two readings' texts equal, as far as a parser can tell?"""
    one, other = parse_answer(gold), parse_answer(answer)
    if is_tuple(gold) != is_tuple(answer):
        one, other = map(as_tuple, (one, other))
    if is_tuple(gold) != is_tuple(answer) and any(is_one_value(side) for side in (one, other)):
        return False  # [7,7] is a pair, or an interval, and not 7
    if is_tuple(answer) and not is_tuple(gold) and "," in gold:  # a list is a tuple only in that order
        return equivalent(one, other) and equivalent(other, one)
    return equivalent(one, other) and _as_often(gold, answer)


def _as_often(gold: str, answer: str) -> bool:
    r"""Does the answer name each entry of a list as often as the gold, where the gold names one twice?

    To math-verify a list is a set. A gold that repeats an entry is no set: 16,3,1,1 is four values in some order. One
    that repeats none, or has braces, is a set of solutions, and an answer may name a double root twice.
    """
    listed = Counter(entries(gold) if "," in gold else ())
    if len(listed) == listed.total():
        return True
    named = entries(answer[2:-2] if answer.startswith(r"\{") and answer.endswith(r"\}") else answer)
    return all(sum(equal_texts(one, other) for other in named) == often for one, often in listed.items())


def _verdict(correct: bool) -> Verdict:
    return CORRECT if correct else WRONG
