r"""One spelling for what LaTeX writes in many ways: spaces, signs, styles, commands, brackets, separators, "and"."""

from __future__ import annotations

import re
from collections.abc import Callable
from unicodedata import normalize

_SIGNS = str.maketrans(
    {
        "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "π": r"\pi ",
        "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ",
        "∅": r"\emptyset ", "∈": r"\in ", "°": r"^{\circ}", "º": r"^{\circ}", "˚": r"^{\circ}", "ℝ": r"\mathbb{R}",
        "²": "^2", "³": "^3", "’": "'", "′": "'",
        "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "",
    }
)  # fmt: skip
for _sign in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞":
    _top, _bottom = normalize("NFKC", _sign).split("\u2044")
    _SIGNS[ord(_sign)] = rf"\frac{{{_top}}}{{{_bottom}}}"
_DELIMITERS = [("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**")]
_GROUP = re.compile(r"\{([^{}\\]+)\}")  # not {7 \choose 3}
_SPACE = re.compile(  # a tie or "\ "; before a unit's sign it stays, which it tells from a variable
    r"(?<!\\)(?:\\ |~)(?!\s*(?:\\(?:text|mathrm)\s*\{\s*[kM]\s*\}\s*|[kM]\s*)?\\(?:Omega|mu)(?![A-Za-z]))"
)
_EDGES = re.compile(r"^(?:\\[,;:]|\\q?quad(?![A-Za-z])|\s)++|(?:\\[,;:\\]|\\q?quad|\s)++\\?$|\\$")
_NOISE = re.compile(
    r"\\(?:displaystyle|textstyle|limits|!|(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?"
    r"|(?:bf|bm|boldsymbol|ensuremath|underline|large|Large|LARGE|huge|Huge)(?![A-Za-z])"
    r"|(?:[hv]?phantom\s*\{[^{}]*|(?:text)?color\s*\{\s*[A-Za-z]+\s*)\})\s?"
)
_BOX = re.compile(r"\\f?box(?:ed)?\s*(?=\{)")
_TOKEN = r"[A-Za-z0-9]|\\(?:pi|theta|alpha|beta|lambda|mu|omega)(?![A-Za-z])"  # what \frac takes without braces
_GAP = r"(?:\s|~|\\[,;: ])*"
_UNITS = rf"((?:\\(?:text|mathrm)\s*\{{[^{{}}]*\}}(?:\^[0-9]|\^\{{-?[0-9]\}})?(?:{_GAP}\\cdot(?![A-Za-z]))?{_GAP})+)"
STYLE = r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it|sf))"
_UPRIGHT = r"\\(?:text(?:rm|normal)?|mathrm)\s*\{\s*"
_UNIT_LETTER = r"[ghlms](?=\s*\})"  # after a number it is a unit
_SAME: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"\\(?:varnothing\b|O\b)|\\\{\s*\\\}"), r"\\emptyset "),
    (re.compile(r"\\bigcup(?![A-Za-z_])"), r"\\cup "),
    (re.compile(r"\\(?:[dtc]frac)(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\degree(?![A-Za-z])"), r"^{\\circ}"),
    (re.compile(r"\\(?:hbox|textsf|mathsf)(?![A-Za-z])"), r"\\text"),
    (re.compile(r"\\(?:text|mathrm)\s*\{\s*(\\?[%$])\s*\}"), r"\1"),
    (
        re.compile(rf"(?<=[0-9.}}])({_GAP})\\frac\s*\{{\s*{_UNITS}\}}\s*\{{\s*{_UNITS}\}}"),
        lambda found: _per(*found.groups()),
    ),
    (
        re.compile(
            rf"(?<=[0-9.}}])({_GAP})\\mathrm\s*\{{\s*\\frac\s*\{{([A-Za-z ]+)\}}\s*\{{([A-Za-z0-9^ ]+)\}}\s*\}}"
        ),
        r"\1\\text{\2/\3}",
    ),
    (re.compile(r"\\\\\s*\[[0-9.]+\s*(?:pt|em|ex|mm|cm)\]|\\cr(?![A-Za-z])"), r"\\\\ "),
    (re.compile(r"(?<=\{)([pbvBV]?)smallmatrix(?=\})"), r"\1matrix"),
    (
        re.compile(r"\^\s*(?:\\prime(?![A-Za-z])|\{((?:\s*\\prime)+)\s*\})"),
        lambda found: "'" * max(1, (found[1] or "").count("p")),
    ),
    (re.compile(r"(?<=[A-Za-z}])_\{([A-Za-z0-9])\}(?![A-Za-z0-9])"), r"_\1"),
    (re.compile(r",\s+(?![0-9!\\\s])"), ","),
    (
        re.compile(r"(?<![0-9])[1-9][0-9]{0,2}(?:(?:\\text|\\mathord)?\{,\}[0-9]{3})+(?![0-9])"),
        lambda found: re.sub(r"[^0-9]", "", found[0]),
    ),
    (
        re.compile(r"(\.[0-9]*)\\dot\s*\{([0-9])\}(?:([0-9]*)\\dot\s*\{([0-9])\})?"),
        lambda found: rf"{found[1]}\overline{{{found[2]}{found[3] or ''}{found[4] or ''}}}",
    ),
    (re.compile(r"(?<=[0-9]\.)\(([0-9]+)\)"), r"\\overline{\1}"),
    (re.compile(r"\\langle|\\rangle"), lambda found: "(" if found[0] == r"\langle" else ")"),
    (re.compile(r"√\s*(?:\(([^()]*)\)|([0-9]+|[a-z]))"), lambda found: rf"\sqrt{{{found[1] or found[2]}}}"),
    (re.compile(rf"(?!{_UPRIGHT}{_UNIT_LETTER}){STYLE}\s*\{{\s*([0-9][0-9.,]*|[a-z])\s*\}}"), r" \1 "),
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
LETTER_IN_TEXT = re.compile(rf"{_UPRIGHT}({_UNIT_LETTER})\s*\}}")
_UNIT_TEXT = re.compile(r"\\(?:text|mathrm)\s*\{([^{}]*)\}|\\cdot|\\[,;: ]")
_OR = re.compile(r"\s*,?\s*(?:\\text\s*\{\s*(and|or)\s*\}|(?<![A-Za-z])(and|or)(?![A-Za-z]))\s*,?\s*")
_INEQUALITY = re.compile(r"[<>]|\\(?:le|ge|lt|gt|leq|geq|leqslant|geqslant)(?![A-Za-z])")


def one_spelling(answer: str) -> str:
    """Without delimiters, bold marks, boxes, a final period, and sizes of brackets."""
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
        if group := _GROUP.fullmatch(text):
            text = group[1].strip()
    if _INEQUALITY.search(text):  # there "and" and "or" are not the same
        return _OR.sub(lambda found: "," if "or" in found.groups() else r" \land ", text)
    return _OR.sub(",", text)


def _per(gap: str, units: str, others: str) -> str:
    """A fraction of units on one line."""
    top, bottom = (_UNIT_TEXT.sub(r" \1 ", side).strip() for side in (units, others))
    return rf"{gap}\text{{{top}/{bottom}}}"
