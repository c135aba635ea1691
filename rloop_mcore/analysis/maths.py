"""LaTeX in texts, as MathML that browsers draw by themselves."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from latex2mathml.converter import convert

_LONGEST = 600  # characters of a formula that is worth drawing

# Display and inline formulas by their usual marks, environments, and a boxed answer that stands in running text. A
# search for an end that is not there goes no further than it is worth: it begins anew at each of a thousand marks.
_FORMULA = re.compile(
    rf"\$\$(?P<dollars>.{{1,{_LONGEST}}}?)\$\$"
    rf"|\\\[(?P<display>.{{1,{_LONGEST}}}?)\\\]|\\\((?P<inline>.{{1,{_LONGEST}}}?)\\\)"
    r"|(?<![\\$\d])\$(?P<dollar>[^$\n]+?)(?<![\\\s])\$(?!\d)"
    r"|(?P<boxed>\\boxed\{(?:[^{}\n]|\{(?:[^{}\n]|\{[^{}\n]*\})*\})*\})",
    re.DOTALL,
)
MARK = "\ue000"  # a private character: no text has it
_NAMESPACE = "{http://www.w3.org/1998/Math/MathML}"
_ELEMENTS = re.compile(
    r"math|m(row|i|n|o|text|space|s|frac|sqrt|root|style|error|padded|phantom|sub|sup|subsup|under|over|underover"
    r"|multiscripts|table|tr|td|enclose|prescripts)|none"
)
_ATTRIBUTES = re.compile(
    r"display(style)?|scriptlevel|mathvariant|stretchy|fence|separator|form|[lr]space|width|height|depth|(min|max)size"
    r"|linethickness|(column|row)(align|spacing|lines)|notation|accent|movablelimits"
)


class Formulas:
    """The formulas of many texts, each once: `table` is a list of (LaTeX as written, MathML or "").

    Past `limit` different formulas the others stay LaTeX.
    """

    def __init__(self, limit: int) -> None:
        self.table: list[tuple[str, str]] = []
        self._number: dict[str, int] = {}
        self._limit = limit

    def mark(self, text: str) -> str:
        """The text with each formula replaced by its number in `table` between two MARKs."""
        return _FORMULA.sub(lambda found: f"{MARK}{self._of(found)}{MARK}", text.replace(MARK, "�"))

    def _of(self, found: re.Match[str]) -> int:
        written = found[0]
        if written not in self._number:
            kind = found.lastgroup or ""
            worth = len(self.table) < self._limit and len(written) <= _LONGEST
            self._number[written] = len(self.table)
            self.table.append((written, to_mathml(found[kind], kind in ("dollars", "display")) if worth else ""))
        return self._number[written]


def to_mathml(latex: str, display: bool = False) -> str:
    """MathML of a formula, without anything that could load or run; "" where it is no LaTeX that we can read."""
    try:
        root = ElementTree.fromstring(convert(latex, display="block" if display else "inline"))
    except Exception:  # models write anything, and the converter has a dozen exceptions for that
        return ""
    for element in root.iter():
        element.tag = element.tag.removeprefix(_NAMESPACE)
        if not _ELEMENTS.fullmatch(element.tag) or (element.text or "").startswith("\\"):
            return ""
        for name in [name for name in element.attrib if not _ATTRIBUTES.fullmatch(name)]:
            del element.attrib[name]
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=False)
