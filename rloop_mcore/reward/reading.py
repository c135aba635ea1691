r"""What an answer says, freed of how it is written: delimiters, spacing, Unicode, separators, unit, percent, base.

Everything here happens before a parser sees the answer, to gold answers and a model's alike. What would let a parser
read one thing for another is set apart (unit, percent sign, base), or refused (`readable`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

from rloop_mcore.reward.units import split_unit

_SIGNS = str.maketrans(
    {
        "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "π": r"\pi ",
        "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ",
        "∅": r"\emptyset ", "∈": r"\in ", "°": r"^{\circ}", "ℝ": r"\mathbb{R}", "²": "^2", "³": "^3", 
        "½": r"\frac{1}{2}",        "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
        "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "’": "'", "′": "'",
        "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "",
    }
)  # fmt: skip
_DELIMITERS = [("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**")]
_SPACE = re.compile(  # a tie or "\ "; before a unit's sign it stays, which it tells from a variable
    r"(?<!\\)(?:\\ |~)(?!\s*(?:\\(?:text|mathrm)\s*\{\s*[kM]\s*\}\s*|[kM]\s*)?\\(?:Omega|mu)(?![A-Za-z]))"
)
_EDGES = re.compile(r"^(?:\\[,;:]|\\q?quad(?![A-Za-z])|\s)++|(?:\\[,;:\\]|\\q?quad|\s)++\\?$|\\$")
_NOISE = re.compile(r"\\(?:displaystyle|textstyle|limits|!|(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?)\s?")
_BOX = re.compile(r"\\f?box(?:ed)?\s*(?=\{)")
_TOKEN = r"[A-Za-z0-9]|\\(?:pi|theta|alpha|beta|lambda|mu|omega)(?![A-Za-z])"  # what \frac takes without braces
_UNIT = r"\\(?:text|mathrm)\s*\{([^{}]*)\}"
_STYLE = r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it|sf))"
_UPRIGHT = r"\\(?:text(?:rm|normal)?|mathrm)\s*\{\s*"
_UNIT_LETTER = r"[ghlms](?=\s*\})"  # after a number it is a unit
_SAME: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"\\(?:varnothing\b|O\b)|\\\{\s*\\\}"), r"\\emptyset "),
    (re.compile(r"\\bigcup(?![A-Za-z_])"), r"\\cup "),
    (re.compile(r"\\(?:[dtc]frac)(?![A-Za-z])"), r"\\frac"),
    (
        re.compile(rf"(?<=[0-9.}}])((?:\s|~|\\[,;: ])*)\\frac\s*\{{\s*{_UNIT}\s*\}}\s*\{{\s*{_UNIT}([\^0-9]*)\s*\}}"),
        r"\1\\text{\2/\3\4}",
    ),
    (re.compile(r"\\langle|\\rangle"), lambda found: "(" if found[0] == r"\langle" else ")"),
    (re.compile(r"√\s*(?:\(([^()]*)\)|([0-9]+|[a-z]))"), lambda found: rf"\sqrt{{{found[1] or found[2]}}}"),
    (re.compile(rf"(?!{_UPRIGHT}{_UNIT_LETTER}){_STYLE}\s*\{{\s*([0-9][0-9.,]*|[a-z])\s*\}}"), r" \1 "),
    (re.compile(r"\\binom\s*([0-9])\s*([0-9])"), r"\\binom{\1}{\2}"),
    (re.compile(rf"\\frac\s*({_TOKEN})"), r"\\frac{\1}"),
    (re.compile(rf"\\frac\s*(\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}})\s*({_TOKEN})"), r"\\frac\1{\2}"),
    (re.compile(r"\^\s*(-[0-9]+|-[A-Za-z]|e)(?!\.?[0-9])"), r"^{\1}"),
    (re.compile(r"([0-9]+|[A-Za-z])!\s*\^"), r"(\1!)^"),
    (re.compile(r"\\[lr]brace(?![A-Za-z])"), lambda found: r"\{" if found[0] == r"\lbrace" else r"\}"),
    (re.compile(r"(?<=[0-9])\.(?=\s*[/)])"), ""),
    (re.compile(r"\{,\}|(?<!\\);"), ","),
    (re.compile(r"^\\text(?:bf|it|rm)?\s*\{\s*(-?\$?[0-9][^{}]*)\}$"), r"\1"),
]
_VARIABLE = re.compile(rf"{_UPRIGHT}({_UNIT_LETTER})\s*\}}")
_CHOICE = re.compile(  # not where what follows is a choice too: it would be several
    rf"{_STYLE}\s*\{{\s*\(([A-J])\)[.:]?\s*\}}\s*(?=[-0-9A-Za-z\\(\[{{.$])(?!\(?[A-J]\)?$|.*{_STYLE}\s*\{{\s*\([A-J]\))"
)
_CURRENCY = re.compile(r"^(-?)(?:\\?\$|[€£¥])\s*(?=[0-9.])|(?<=[0-9])\s*(?:[€£¥]|\\\$)$")
_SPACED_THOUSANDS = re.compile(r"-?[0-9]{1,3}(?:(?:\s|~|,\s?\\!|\\[,!;: ])\s*[0-9]{3})+(?:\.[0-9]+)?")
_SEPARATOR = re.compile(r"[\s~,]|\\[,!;: ]")
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_SCALE = re.compile(rf"(?<=[0-9])\s*(?:\\text\{{)?\s*({'|'.join(_SCALES)})\b\s*\}}?", re.IGNORECASE)
_PERCENT = re.compile(r"\s*(?:\\?%|(?:\\text\s*\{)?\s*\b(?:percent(?:age)?|pct)\s*\}?)$", re.IGNORECASE)
_DEGREES = re.compile(
    r"\s*(?:\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})|(?<=[0-9}\s])(?:\\text\s*\{)?\s*\b[Dd]egrees?\b\s*\}?)"
    r"(?:\s*(?:\\(?:text|mathrm)\s*\{\s*)?([CF])(?![A-Za-z])\s*\}?)?"
)
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_BASE = re.compile(
    r"\(?(?:\\text\{)?([0-9A-Fa-f.]*)\}?([0-9A-Fa-f.]*)\)?_\s*(?:\{?([0-9]{1,2})\}?|\{\\text\{([a-z]+)\}\})"
)
_BASE_NAMES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9"}
_BASE_NAMES |= {"ten": "10", "twelve": "12", "sixteen": "16"}
_MIXED = re.compile(r"(-?[0-9]+)\s+([0-9]+)\s*/\s*([0-9]+)")
_SCIENTIFIC = re.compile(r"(-?(?:[0-9]*\.[0-9]+|[0-9]+))[eE](\+?[0-9]+|-[0-9]+)")
_REPEATING = re.compile(r"(?<![0-9])([0-9]*)\.([0-9]*)\\(?:overline|bar)\s*\{([0-9]+)\}")
_DOTTED = re.compile(r"(-?[0-9]*\.[0-9]*?)(([0-9])\3{2,})\s*(?:\.\.\.|…|\\l?dots)")
_OR = re.compile(r"\s*,?\s*(?:\\text\s*\{\s*(and|or)\s*\}|(?<![A-Za-z])(and|or)(?![A-Za-z]))\s*,?\s*")
_INEQUALITY = re.compile(r"[<>]|\\(?:le|ge|lt|gt|leq|geq|leqslant|geqslant)(?![A-Za-z])")
_IN_BRACES = re.compile(r"(?<=\{)[0-9]{1,3}(?:,[0-9]{3})+(?=\})")  # not the set \{1,234\}
_TWO_NUMBERS = re.compile(r"(?<![_^0-9.])[0-9]+(?:\.[0-9]+)?(?:\s|~|\\[,;:! ]|\\q?quad(?![A-Za-z]))+[0-9]")


@dataclass(frozen=True, slots=True)
class Reading:
    """An answer as `text` (LaTeX), and what was taken off its ends."""

    text: str
    unit: str = ""  # "?": one that is not known
    percent: bool = False
    base: str = ""  # of a numeral: "2"
    choice: str = ""  # the letter before what it chooses: "D" of \textbf{(D)}\ 12

    @property
    def readable(self) -> bool:
        """Not two numbers side by side: a parser adds them, as it does a mixed number's parts."""
        return not _TWO_NUMBERS.search(self.text)


@lru_cache(maxsize=4096)
def read(answer: str) -> Reading:
    """Read an answer, a gold one or a model's."""
    text = _bare(answer)
    if found := _CHOICE.match(text):
        return replace(_set_apart(text[found.end() :]), choice=found[1])
    return _set_apart(text)


def _set_apart(text: str) -> Reading:
    percent = _PERCENT.search(text)
    if percent and percent.start():
        return Reading(_numbers(text[: percent.start()]), percent=True)
    if based := _BASE.fullmatch(text):
        digits = based[1] + based[2]
        if digits:
            return Reading(digits.upper(), base=based[3] or _BASE_NAMES.get(based[4], based[4]))
    if _TRIGONOMETRIC.search(text):
        text = _DEGREES.sub(r"\\cdot\\frac{\\pi}{180}", text)
    degrees = _DEGREES.search(text)
    text = _DEGREES.sub("", text)
    text, unit = split_unit(_SCALE.sub(lambda scale: rf"\cdot 10^{{{_SCALES[scale[1].lower()]}}} ", text).strip())
    return Reading(_numbers(text), unit or (f"degree{degrees[1] or ''}" if degrees else ""))


def _bare(answer: str) -> str:
    """Without delimiters, bold marks, boxes, a final period, currency, and sizes of brackets."""
    text = _NOISE.sub("", _BOX.sub("", " ".join(_SPACE.sub(" ", answer.translate(_SIGNS)).split())))
    for pattern, same in _SAME:
        text = pattern.sub(same, text)
    before = None
    while text != before:
        before = text
        text = _EDGES.sub("", text)
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1].rstrip()
        for left, right in _DELIMITERS:
            inner = text[len(left) : len(text) - len(right)]
            if text.startswith(left) and text.endswith(right) and inner.strip() and left not in inner:
                text = inner.strip()
    text = _CURRENCY.sub(r"\1", text).strip()
    if _INEQUALITY.search(text):  # there "and" and "or" are not the same
        return _OR.sub(lambda found: "," if "or" in found.groups() else r" \land ", text)
    return _OR.sub(",", text)


def _numbers(text: str) -> str:
    """Numbers in the one spelling that math-verify reads for what they are."""
    text = _VARIABLE.sub(r" \1 ", text).strip()  # units are off by now
    if _SPACED_THOUSANDS.fullmatch(text):
        return _SEPARATOR.sub("", text)
    if mixed := _MIXED.fullmatch(text):
        return rf"{mixed[1]}\frac{{{mixed[2]}}}{{{mixed[3]}}}"
    scientific = _SCIENTIFIC.fullmatch(text)
    if scientific and not re.fullmatch(r"[02-9]e-[0-9]", text):  # 2e-3 may be 2e - 3
        return rf"{scientific[1]} \cdot 10^{{{int(scientific[2])}}}"
    if dotted := _DOTTED.fullmatch(text):
        text = rf"{dotted[1]}\overline{{{dotted[3]}}}"
    text = _IN_BRACES.sub(lambda found: found[0].replace(",", ""), text)
    return _REPEATING.sub(_repeating, text)


def _repeating(found: re.Match[str]) -> str:
    whole, fixed, period = found.groups()
    shift = 10 ** len(fixed)
    value = Fraction(int((whole or "0") + fixed), shift) + Fraction(int(period), shift * (10 ** len(period) - 1))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
