"""What an answer that is an equation says the value is: 5 of "x = 5", "m + n = 5", "f(f(1)) = 2 + 3 = 5"."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from rloop_mcore.reward.equivalence import parse_answer
from rloop_mcore.reward.forms import THOUSANDS, entries, is_tuple

# What an answer may be said to be the value of: a name, a function of one, or letters added, multiplied or divided.
_NAMED = re.compile(
    r"""(?>(?: \\(?:angle|triangle|overline|widehat|hat|vec|d?dot|math(?:bf|cal|bb|rm)|operatorname|text)(?![A-Za-z])
    | \\(?:alpha|beta|gamma|delta|theta|lambda|mu|phi|varphi|omega|sigma|rho|tau|epsilon)(?![A-Za-z])
    | \\(?:Pr|det|max|min|lim|arg|deg|dim|circ|sin|cos|tan|cot|sec|csc)(?![A-Za-z]) | \\frac\{[A-Za-z]+\}\{[A-Za-z]+\}
    | (?<=[A-Za-z])\^\{-1\}(?=\() | \\[,;:!\ ] | \\\| | \\[lr]?Vert(?![A-Za-z])
    | (?<=[A-Za-z0-9})])\ ?(?:[+/:-]|\\(?:cdot|cap|cup)(?![A-Za-z]))\ ?(?=[A-Za-z]|\\vec)
    | _(?:[A-Za-z0-9]+|\{(?:[^{}=]|\{[^{}=]*\})*\})
    | (?:(?<=[fghPENSTV])|(?<=\\Pr)|(?<=\\mathbb\{[EP]\}))(?:\((?:[^()]|\([^()]*\))*\)|\[[^\[\]]*\])
    | \([A-Za-z0-9\ ]+\) | (?<=[A-Za-z}])\([A-Za-z0-9,\ ]+\) | [A-Za-z|\[\]{}\ ] )+)
    | (?:10+\ ?[a-z]\ ?\+\ ?)+[a-z]""",
    re.VERBOSE,
)
_UNORDERED = re.compile(r"\((?:y,\s*x(?:,\s*z)?|[xyz],\s*z,\s*[xyz]|z(?:,\s*[xy]){1,2})\)")
_TUPLE_NAME = re.compile(r"(\([a-z](?:,\s*[a-z])+\))\s*=\s*(?=\()")  # (x, y) = (1, 2), (x, y) = (2, 1)
_POINT = re.compile(r"[A-HP-T](?:_[0-9])?\s*(?=\()")  # P(1, 2)
_EQUALS = re.compile(r"(?<![<>!:])=|(?<=[0-9)]!)=")  # 4!=24 has one, x != 24 has none
_INDEX = re.compile(r"_\s*\{[^{}]*\}")  # \sum_{k=0}^{9} is no equation
_ARGUMENT = re.compile(r"(?:[A-Z]|\\Pr|\\mathbb\s*\{[A-Z]\})\s*(?:\([^()]*\)|\[[^\[\]]*\])")  # nor is P(X=2)
_SEVERAL = re.compile(r"[<>,]|\\(?:le|ge|lt|gt|ne|begin|in)(?![A-Za-z])")


def value_of_equation(gold: str, answer: str, equal: Callable[[str, str], bool]) -> str | None:
    """What an answer such as "x = 2 + 3 = 5" says the value is, where the gold is no equation; None if that is nothing.

    "x^2 = 5" and "2x = 5" do not say that anything is 5, nor does "4 = 5"; "m + n = 5" does, and so does "x = ab = 5",
    though "x = 4 = 5" doesn't.
    """
    if (name := _TUPLE_NAME.match(answer)) and _UNORDERED.fullmatch(name[1]) is None:
        again = "=" in gold  # the first has no equal, where the gold is named too
        answer = _TUPLE_NAME.sub(
            lambda found: found[0] if found[1] != name[1] or (again and not found.start()) else "", answer
        )
    if is_tuple(gold) and (point := _POINT.match(answer)) and is_tuple(answer[point.end() :]):
        return answer[point.end() :]
    parts = sides(answer)
    if len(sides(gold)) > 1 or "=" not in answer:
        return answer
    if len(parts) == 2 and _UNORDERED.fullmatch(parts[0]) and is_tuple(entries(parts[1])[0]):
        return ",".join(_in_order(parts[0], value) for value in entries(parts[1]))
    if len(parts) == 2 and _NAMED.fullmatch(parts[1]) and not _NAMED.fullmatch(parts[0]):
        parts.reverse()
    first, *others = parts
    values = others if others and _NAMED.fullmatch(first) else parts
    several = [_SEVERAL.search(value) and not THOUSANDS.fullmatch(value) for value in values]
    if values is parts and len(parts) == 2 and several == [None, True]:
        return None  # x^2 = 1, 4
    if any(several):
        return answer
    if not all(values) or any(_EQUALS.search(_INDEX.sub("", value)) for value in values):
        return None
    *steps, value = values
    if values is not parts:
        steps = [step for step in steps if not _letters(step) - _letters(value)]  # of others nothing is known
    return value if all(equal(value, step) for step in steps) else None


def _letters(formula: str) -> set[Any]:
    return {letter for item in parse_answer(formula) for letter in getattr(item, "free_symbols", ())}


def _in_order(names: str, value: str) -> str:
    """(1, 2) of (y, x) = (1, 2) is (2, 1)."""
    named = sorted(zip(names[1:-1].split(","), entries(value[1:-1]), strict=False))
    return f"({','.join(entry for _, entry in named)})"


def sides(equation: str) -> list[str]:
    """What stands between the equals signs, but for those in an index or in the argument of a probability."""
    for nested in (_INDEX, _ARGUMENT):
        equation = nested.sub(lambda found: found[0].replace("=", "\0"), equation)
    return [side.strip().replace("\0", "=") for side in _EQUALS.split(equation)]
