r"""Answers that restate a formula of their problem: with its value, or still to be worked out.

"x^2 = 5" says what is asked for where that is x^2. \tan 60^\circ says nothing for "Compute \tan 60^\circ." but has the
gold's value, so that a comparison of the two finds nothing wrong with it: copying would be right for 7 % of MATH's
training problems.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from rloop_mcore.reward.equations import sides

_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", re.DOTALL)
# Without what is but looks, and without brackets; \dfrac is \frac.
_TOKEN = re.compile(
    r"\\[dtc]?((?:frac|binom)(?![A-Za-z]))|\\([A-Za-z]+)|([A-Za-z]|[^A-Za-z\s\\{}()\[\],;:.$]|\.(?=[0-9]))"
)
_LOOKS = {"left", "right", "displaystyle", "text", "mathrm", "quad", "qquad", "cdot", "times", "frac", "/", "*"}
_RELATION = re.compile(r"[=<>,]|\\(?:[lg](?:e|eq|t|eqslant)|neq?|in|cup)(?![A-Za-z])")
_WORKED_OUT = re.compile(
    r"\s*+[-+]?(?>(?:\\[dt]?frac(?![A-Za-z])|[0-9./{}()\[\]\s])*)"
    r"(?:\\(?:pi|infty|theta|alpha|beta|lambda|phi|omega)(?![A-Za-z])|[A-Za-z]*+)[0-9{}()\[\]\s]*+"
)


def value_of_formula(problem: str, answer: str) -> str | None:
    """What an answer says that a formula is which stands by itself in the problem; None if it says nothing of one."""
    formula, *values = sides(answer)
    if not values or not any(_tokens(formula) == _tokens(found) for found in _formulas(problem) if "=" not in found):
        return None
    return values[0] if len(values) == 1 else "=".join(["v", *values])  # steps to a value follow a name


def restates(problem: str, gold: str, answer: str, right: Callable[[str], bool]) -> bool:
    """Is the right answer a formula of the problem, or a side of one, and the gold made of other numbers, letters,
    functions? It is that formula in another order too, or with more in it than in a formula that is `right` itself
    ("\\tan 60^\\circ + 0").

    Not where nothing is left to do in it: a number, a letter, or a condition such as x > 0 may well be the answer.
    """
    if _worked_out(answer):
        return False
    value = _tokens(answer.rpartition("=")[2])
    if Counter(value) == Counter(_tokens(gold.rpartition("=")[2])):
        return False
    given = {side: _tokens(side) for formula in _formulas(problem) for side in formula.split("=")}
    return any(
        value == tokens or (tokens and _within(tokens, value) and not _worked_out(side) and right(side))
        for side, tokens in given.items()
    )


def _formulas(problem: str) -> list[str]:
    return [found[found.lastindex or 0] for found in _FORMULA.finditer(problem)]


def _within(tokens: list[str], value: list[str]) -> bool:
    """Are they all there, in that order or with no other?"""
    rest = iter(value)
    return all(token in rest for token in tokens) or Counter(tokens) == Counter(value)


def _worked_out(formula: str) -> bool:
    return all(_WORKED_OUT.fullmatch(part) for part in _RELATION.split(formula))


def _tokens(formula: str) -> list[str]:
    found = (token[token.lastindex or 0] for token in _TOKEN.finditer(formula))
    return [token for token in found if token not in _LOOKS]
