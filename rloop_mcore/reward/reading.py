r"""What an answer says, freed of how it is written: a choice's letter, currency, unit, percent, base, forms of numbers.

Everything here happens before a parser sees the answer, to gold answers and a model's alike. What would let a parser
read one thing for another is set apart (unit, percent sign, base), or refused (`readable`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

from rloop_mcore.reward.spelling import LETTER_IN_TEXT, STYLE, one_spelling
from rloop_mcore.reward.units import split_unit

_PLAIN = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")
_CHOICE = re.compile(  # not where what follows is a choice too: it would be several
    rf"(?:{STYLE}\s*\{{\s*(?:\(([A-J])\)[.:]?|([A-J])[.):])\s*\}}\s*|([A-J])[.):]\s*)"
    rf"(?=[-0-9A-Za-z\\(\[{{.$])(?!\(?[A-J]\)?$|.*{STYLE}\s*\{{\s*\([A-J]\))"
)
_CURRENCY = re.compile(r"^(-?)\\?([$€£¥₹])\s*(?=[0-9.])|(?<=[0-9])\s*(?:([€£¥₹])|\\(\$))$")
_CURRENCIES = {"$": "dollar", "€": "euro", "£": "sterling", "¥": "yen", "₹": "rupee"}
_SPACED_THOUSANDS = re.compile(r"-?[0-9]{1,3}(?:(?:\s|~|,\s?\\!|\\[,!;: ])\s*[0-9]{3})+(?:\.[0-9]+)?")
_WITH_THOUSANDS = r"-?(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?"
_LIST = re.compile(rf"{_WITH_THOUSANDS}(?:,\s+{_WITH_THOUSANDS})+")
_SEPARATOR = re.compile(r"[\s~,]|\\[,!;: ]")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(rf"(?<=[0-9])\s*(?:\\text\{{)?\s*({'|'.join(_SCALES)})\b\s*\}}?", re.IGNORECASE)
_PERCENT = re.compile(r"\s*(?:\\?%|(?:\\text\s*\{)?\s*\b(?:percent(?:age)?|pct)\s*\}?)$", re.IGNORECASE)
_PERCENT_IN_LIST = re.compile(r"\s*\\?%(?=\s*,)")  # 10\%, 20\%
_DEGREES = re.compile(
    r"\s*(?:\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})|(?<=[0-9}\s])(?:\\text\s*\{)?\s*\b[Dd]egrees?\b\s*\}?)"
    r"(?:\s*(?:\\(?:text|mathrm)\s*\{\s*)?([CF])(?:elsius|ahrenheit)?(?![A-Za-z])\s*\}?)?"
)
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_FILLER = r"(?>(?:\\(?:text|mathrm)(?![A-Za-z])|\\[,;:! ]|[\s~(){}])*)"
_BASE = re.compile(
    rf"\(?((?:\\(?:text|mathrm|overline)\s*\{{[0-9A-Fa-f.]+\}}|[0-9A-Fa-f.])+)\)?(?:_|{_FILLER}(?:in )?(?=base))"
    rf"{_FILLER}(?:base\b{_FILLER})?(-?[0-9]{{1,2}}|[a-z]{{3,}}){_FILLER}"
)
_NO_DIGIT = re.compile(r"\\[a-z]+|[\s{}]")
_BASE_NAMES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9"}
_BASE_NAMES |= {"ten": "10", "twelve": "12", "sixteen": "16"}
_MIXED = re.compile(r"(-?[0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)")
_SCIENTIFIC = re.compile(r"(-?(?:[0-9]*\.[0-9]+|[0-9]+))[eE](\+?[0-9]+|-[0-9]+)")
_REPEATING = re.compile(r"(?<![0-9])([0-9]*)\.([0-9]*)\\(?:overline|bar)\s*\{([0-9]+)\}")
_DOTTED = re.compile(
    r"(-?[0-9]*\.[0-9]*?)(?:([0-9])\2{2,}|([0-9]{2,9}?)\3{2,}|([0-9]{3,9}?)\4+)\s*(?:\.\.\.|…|\\l?dots)"
)
_IN_BRACES = re.compile(r"(?<=\{)[0-9]{1,3}(?:,[0-9]{3})+(?=\})")  # not the set \{1,234\}
_OR = re.compile(r"(?<![A-Za-z\\])or(?![A-Za-z])|\\(?:lor|vee)(?![A-Za-z])")
_NO_MATTER = re.compile(r"(?<![0-9,])\s+|\s+(?=[-+*/=<>\\])")
_SLASHED = re.compile(r"(?<![\w.^/})\]])([0-9]+)/([0-9]+)(?=\s*(?:[A-Za-z(]|\\[A-Za-z]))")  # 1/2 x is no 1/(2x)
_TWO_NUMBERS = re.compile(
    r"(?<![_^0-9.])[0-9]+(?:\.[0-9]+)?(?:\s|~|\\[,;:! ]|\\q?quad(?![A-Za-z])|\\(?:text|mathrm)\s*\{[^{}]*\})+[0-9]"
)


@dataclass(frozen=True, slots=True)
class Reading:
    """An answer as `text` (LaTeX), and what was taken off its ends."""

    text: str
    unit: str = ""  # "?": one that is not known
    percent: bool = False
    base: str = ""  # of a numeral: "2"
    choice: str = ""  # the letter before what it chooses: "D" of \textbf{(D)}\ 12
    either: bool = False  # there is an "or" in it

    @property
    def readable(self) -> bool:
        """Not two numbers side by side, which a parser adds as a mixed number's parts, or with text between them."""
        return not _TWO_NUMBERS.search(self.text)

    def part(self, text: str) -> Reading:
        """A part of it, which may be 15,600 or 1011_3; a unit and a percent sign are of all of it."""
        if text == self.text:
            return self
        inner = read(text)
        unit, percent = inner.unit or self.unit, inner.percent or self.percent
        return replace(self, text=inner.text, unit=unit, percent=percent, base=inner.base)


@lru_cache(maxsize=4096)
def read(answer: str) -> Reading:
    """Read an answer, a gold one or a model's."""
    if _PLAIN.fullmatch(answer):  # most are, and nothing below has a part in them
        return Reading(answer)
    text, either = one_spelling(answer), _OR.search(answer) is not None
    if found := _CHOICE.match(text):
        return replace(_set_apart(text[found.end() :]), choice=found[found.lastindex or 0], either=either)
    return replace(_set_apart(text), either=either)


def without_spaces(reading: Reading) -> Reading:
    """Without spaces that part no numbers: LaTeX sets none, and a text that no parser reads is compared as it is."""
    return replace(reading, text=_NO_MATTER.sub("", reading.text))


def _set_apart(text: str) -> Reading:
    currency = ""
    if found := _CURRENCY.search(text):
        currency = _CURRENCIES[found[2] or found[3] or found[4]]
        text = _CURRENCY.sub(r"\1", text).strip()
    percent = _PERCENT.search(text)
    if percent and percent.start():
        return Reading(_numbers(_PERCENT_IN_LIST.sub("", text[: percent.start()])), percent=True)
    if (based := _BASE.fullmatch(text)) and (base := _BASE_NAMES.get(based[2], based[2])).strip("-").isdigit():
        return Reading(_NO_DIGIT.sub("", based[1]).upper(), base=base)
    if _TRIGONOMETRIC.search(text):
        text = _DEGREES.sub(r"\\cdot\\frac{\\pi}{180}", text)
    degrees = _DEGREES.search(text)
    text = _DEGREES.sub("", text)
    text, unit = split_unit(_SCALE.sub(lambda scale: rf"\cdot 10^{{{_SCALES[scale[1].lower()]}}} ", text).strip())
    if unit and "," in text and not text.startswith(("(", "[")):
        text, unit = _listed(text, unit)
    return Reading(_numbers(text), unit or (f"degree{degrees[1] or ''}" if degrees else currency))


def _listed(text: str, unit: str) -> tuple[str, str]:
    """A list without the units of its entries, the last of which is off already; and theirs, where they differ."""
    *entries, last = text.split(",")
    numbers, units = zip(*map(split_unit, entries), strict=True)
    if not all(units):
        return text, unit
    return ",".join((*numbers, last)), unit if {*units} == {unit} else ", ".join((*units, unit))


def _numbers(text: str) -> str:
    """Numbers in the one spelling that math-verify reads for what they are."""
    text = LETTER_IN_TEXT.sub(r" \1 ", text).strip()  # units are off by now
    if _SPACED_THOUSANDS.fullmatch(text):
        return _SEPARATOR.sub("", text)
    if _LIST.fullmatch(text):
        return ", ".join(number.replace(",", "") for number in re.split(r",\s+", text))
    if mixed := _MIXED.fullmatch(text):
        return rf"{mixed[1]}\frac{{{mixed[2]}}}{{{mixed[3]}}}"
    scientific = _SCIENTIFIC.fullmatch(text)
    if scientific and not re.fullmatch(r"[02-9]e-[0-9]", text):  # 2e-3 may be 2e - 3
        return rf"{scientific[1]} \cdot 10^{{{int(scientific[2])}}}"
    if dotted := _DOTTED.fullmatch(text):
        text = rf"{dotted[1]}\overline{{{dotted[2] or dotted[3] or dotted[4]}}}"
    text = _IN_BRACES.sub(lambda found: found[0].replace(",", ""), text)
    return _SLASHED.sub(r"\\frac{\1}{\2}", _REPEATING.sub(_repeating, text))


def _repeating(found: re.Match[str]) -> str:
    whole, fixed, period = found.groups()
    shift = 10 ** len(fixed)
    value = Fraction(int((whole or "0") + fixed), shift) + Fraction(int(period), shift * (10 ** len(period) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
