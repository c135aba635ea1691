r"""Several names with a value each: x = 1, y = 2, and its other forms (x, y) = (1, 2) and x = y = 0.

To a parser they are equations in any order, and their values alone a set: 2, 1 would do for x = 1, y = 2.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from rloop_mcore.reward.equations import sides
from rloop_mcore.reward.forms import entries, is_tuple, parts_of_list
from rloop_mcore.reward.reading import Reading

_NAME = re.compile(r"(?:\\(?:angle|overline))?(?:[A-Za-z]|[A-Z]{2,3}|\\[a-z]+)(?:_[A-Za-z0-9]+)?(?:\([A-Za-z0-9]\))?")
_NAMES = re.compile(r"\(([^()=]+)\)\s*=\s*(\(.+\))")


def same_values(gold: Reading, answer: Reading, equal: Callable[[str, str], bool]) -> bool | None:
    """Does an answer give the names of the gold the gold's values? Without names it gives them in the gold's order.

    None where the gold has not several names, or the answer has others.
    """
    ours, theirs = named_values(gold.text), named_values(answer.text)
    if not ours or set(theirs) - set(ours) or gold.percent != answer.percent:
        return None
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return None
    if gold.either != answer.either or (theirs and len(theirs) < len(ours)):
        return False  # x = 1 or y = 2; a = b = 1 for a = b = c = 1
    values = [theirs[name] for name in ours] if theirs else []
    if not theirs:
        roots = len({name.partition("_")[0] for name in ours}) == 1  # x_1 and x_2, which are in no order
        if roots or "=" in answer.text or r"\begin" in answer.text:
            return None
        values = entries(answer.text[1:-1] if is_tuple(answer.text) else answer.text)
    return len(values) == len(ours) and all(map(equal, ours.values(), values))


def named_values(text: str) -> dict[str, str]:
    """The value of each name, in the text's order; empty where the text is anything else, or has but one name."""
    if (found := _NAMES.fullmatch(text)) and is_tuple(found[2]):
        names, values = found[1].split(","), entries(found[2][1:-1])
        named = list(zip(names, values, strict=True)) if len(names) == len(values) else []
    else:
        chains = map(sides, parts_of_list(text))
        named = [(name, chain[-1]) for chain in chains for name in chain[:-1] or [""]]
    values_of = {re.sub(r"[{}\s]", "", name): value for name, value in named}
    whole = len(values_of) == len(named) > 1 and all(values_of.values())
    return values_of if whole and all(map(_NAME.fullmatch, values_of)) else {}
