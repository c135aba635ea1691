"""Plain numbers, compared without a parser: integers, decimals, and fractions of integers."""

from __future__ import annotations

import re
from fractions import Fraction

from rloop_mcore.reward.reading import Reading

_INTEGER = r"[0-9]{1,30}|[1-9][0-9]{0,2}(?:,[0-9]{3}){1,9}"
_DECIMAL = re.compile(rf"(-?)\+?({_INTEGER})?(?:(\.)([0-9]{{1,30}})?)?")
_FRACTION = re.compile(
    r"(-?)\\frac\s*(?:\{(-?[0-9]{1,30})\}\s*\{([0-9]{1,30})\}|([0-9])([0-9]))|(-?)([0-9]{1,30})/([0-9]{1,30})"
)
# math-verify compares decimals rounded to six places. Further apart than this, no rounding can make two numbers one.
_FAR = Fraction(1, 1000)


def exact(text: str) -> Fraction | None:
    """The value of a plain number, None for anything else."""
    if found := _DECIMAL.fullmatch(text):
        sign, whole, _, part = found.groups()
        if whole or part:
            digits = (whole or "0").replace(",", "")
            return Fraction(f"{sign}{digits}.{part or 0}")
    if found := _FRACTION.fullmatch(text):
        signs = (found[1] or "") + (found[6] or "")
        top, bottom = int(found[2] or found[4] or found[7]), int(found[3] or found[5] or found[8])
        return Fraction(-top if signs else top, bottom) if bottom else None
    return None


def same_number(gold: Reading, answer: Reading) -> bool | None:
    """Are two plain numbers the same? None where that is not for a glance to say.

    Decimals that nearly agree are left to the rounding of the symbolic comparison; so is what has a percent sign, a
    base or a choice's letter, and what has two units.
    """
    if any(side.percent or side.base or side.choice for side in (gold, answer)) or (gold.unit and answer.unit):
        return None
    first, second = exact(gold.text), exact(answer.text)
    if first is None or second is None:
        return None
    if first == second:
        return True
    rounded = "." in gold.text or "." in answer.text
    return None if rounded and abs(first - second) <= _FAR * max(abs(first), abs(second)) else False
