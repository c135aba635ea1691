r"""One spelling for what LaTeX writes in many ways: spaces, signs, styles, commands, brackets, separators, "and"."""

from __future__ import annotations

import re
from collections.abc import Callable
from html import unescape
from unicodedata import normalize

_SIGNS = str.maketrans(
    {
        "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "π": r"\pi ",
        "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ",
        "≈": r"\approx ", "¢": r"\text{ cents}",
        "∅": r"\emptyset ", "∈": r"\in ", "°": r"^{\circ}", "º": r"^{\circ}", "˚": r"^{\circ}", "ℝ": r"\mathbb{R}",
        "、": ",", "’": "'", "′": "'", "\u2011": "-", "\u2044": "/",
        "\f": r"\f", "\b": r"\b",  # of \frac and \binom, in a file that escaped them once
        "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "",
    }
)  # fmt: skip
_SIGNS |= {code: chr(code - 0xFEE0) for code in map(ord, "０１２３４５６７８９（）［］，：；＝＋－＜＞")}
for _sign in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞":
    _top, _bottom = normalize("NFKC", _sign).split("\u2044")
    _SIGNS[ord(_sign)] = rf"\frac{{{_top}}}{{{_bottom}}}"
_ENTITY = re.compile(r"&(?:[A-Za-z]+|#[0-9]{1,6});")  # of HTML; "1&2" is a matrix's row
_SCRIPTS = re.compile("[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+|[₀₁₂₃₄₅₆₇₈₉]+")
_DELIMITERS = [("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**")]
_INFIX = re.compile(r"\\(?:choose|over|atop)(?![A-Za-z])")  # they want their braces
_SPACE = re.compile(  # a tie or "\ "; before a unit's sign it stays, which it tells from a variable
    r"(?<!\\)(?:\\ |~)(?!\s*(?:\\(?:text|mathrm)\s*\{\s*[kM]\s*\}\s*|[kM]\s*)?\\(?:Omega|mu)(?![A-Za-z]))"
)
_BRACES = re.compile(r"\\.|[{}]")
_EDGES = re.compile(
    r"^(?>(?:\\[,;:]|\\q?quad(?![A-Za-z])|\s|=)+)|(?>(?:\\[,;:\\]|\\q?quad|\\text\s*\{\s*[.,]\s*\}|[\s,;])+)\\?$|\\$"
)
_NOISE = re.compile(
    r"\\(?:displaystyle|textstyle|limits|!|(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?"
    r"|mathbf(?=\s*\{\s*-?\\(?:[dt]?frac|sqrt)(?![A-Za-z]))"
    r"|(?:bf|bm|boldsymbol|ensuremath|underline|large|Large|LARGE|huge|Huge)(?![A-Za-z])"
    r"|(?:[hv]?phantom\s*\{[^{}]*|(?:text)?color\s*\{\s*[A-Za-z]+\s*)\})\s?"
)
_STYLED = re.compile(  # not letters, which it may tell from others
    r"\\math(?:bf|rm|it|sf)\s*(?=\{[A-Za-z\s]*[^A-Za-z\s{}])|\\text(?:bf|it|rm|normal)?\s*(?=\{\s*\$[^$]*\$\s*\}$)"
)
_BOX = re.compile(r"\\f?box(?:ed)?\s*(?=\{)")
_TOKEN = r"[A-Za-z0-9]|\\(?:pi|theta|alpha|beta|lambda|mu|omega)(?![A-Za-z])"  # what \frac takes without braces
_GAP = r"(?:\s|~|\\[,;: ])*"
_UNITS = rf"((?:\\(?:text|mathrm)\s*\{{[^{{}}]*\}}(?:\^[0-9]|\^\{{-?[0-9]\}})?(?:{_GAP}\\cdot(?![A-Za-z]))?{_GAP})+)"
STYLE = r"\\(?:text(?:bf|it|rm|normal)?|math(?:rm|bf|it|sf))"
_UPRIGHT = r"\\(?:text(?:rm|normal)?|mathrm)\s*\{\s*"
_UNIT_LETTER = r"[ghlms](?=\s*\})"  # after a number it is a unit
_VARIABLE = r"(?:\\[A-Za-z]+|[A-Za-z])(?:_(?:[A-Za-z0-9]|\{[^{}]*\}))?"
# In text or bare they are the command; sec and min are units there, and tg is a product.
_FUNCTIONS = "(?:arc)?(?:sin|cos|tan|cot)|(?:sin|cos|tan)h|csc|ln|log|exp"
_CHOSEN = r"(?:\{\s*([0-9]+|[a-z])\s*\}|([0-9]|[a-z]))"  # the numbers of {}_{10}C_3
_CIS = r"(?:\\(?:operatorname|text|mathrm)\s*\{\s*cis\s*\}|(?<![A-Za-z])\\?cis(?![A-Za-z]))"
_NESTED = r"(?:[^()]|\([^()]*\))+"
_ANGLE = (
    r"(?:\\[dt]?frac\s*\{[^{}]*\}\s*\{[^{}]*\}|[0-9.]+|\\[a-z]+|[a-z])(?:\s*\\pi)?(?:\s*/\s*[0-9]+)?"
    r"(?:\s*\^\s*\{?\\circ\}?)?"
)
_IN_TEXT_OR = r"(?:\\text\s*\{\s*or\s*\}|\bor\b)"
_OPEN_END = re.compile(r"[(\[]\s*-\s*\\infty\s*,|\\infty\s*[)\]]")
_SQUARE = r"(?:\^\s*(?:2|\{\s*2\s*\})\s*)"
_SAME: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"\\([lgn]e)(?:q|qq|qslant)(?![A-Za-z])"), r"\\\1"),
    (
        re.compile(
            rf"\\operatorname\s*\{{\s*({_FUNCTIONS}|max|min|sec)\s*\}}|\\(?:mathrm|text)\s*\{{\s*({_FUNCTIONS})\s*\}}"
            rf"|(?<![A-Za-z\\])({_FUNCTIONS}|pi)(?![A-Za-z])"
        ),
        lambda found: rf"\{found[found.lastindex or 0]} ",
    ),
    (
        re.compile(r"\\(?:operatorname|mathrm|text)\s*\{\s*(arc)?(c?)tg\s*\}"),
        lambda found: rf"\{found[1] or ''}{'cot' if found[2] else 'tan'} ",
    ),
    (
        re.compile(r"(?:\\|(?<![A-Za-z]))sqrt\s*\(([^()]*)\)|(?<![A-Za-z\\])sqrt(?=\s*\{)"),
        lambda found: _root(found[1]),
    ),
    (re.compile(rf"{_CIS}{_GAP}(?:\(({_NESTED})\)|({_ANGLE}))"), r"(\\cos(\1\2)+i\\sin(\1\2))"),
    (re.compile(r"\\text\s*\{\s*infinity\s*\}"), r"\\infty "),
    (re.compile(r"\\(?:varnothing\b|O\b)|\\\{\s*\\\}"), r"\\emptyset "),
    (re.compile(r"\\bigcup(?![A-Za-z_])"), r"\\cup "),
    (re.compile(r"\\(?:[dtcsx]|nice)frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\{([^{}]*)\\over(?![A-Za-z])\s*([^{}]*)\}"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\degree(?![A-Za-z])"), r"^{\\circ}"),
    (
        re.compile(r"(?<=[0-9.])(?:\{\}\s*(?=\^)|\s*\^\s*(?:o(?![A-Za-z])|\{\s*(?:o|\\text\s*\{\s*o\s*\})\s*\}))"),
        lambda found: r"^{\circ}" if "o" in found[0] else "",
    ),
    (re.compile(r"\\lg(?![A-Za-z])"), r"\\log_{10}"),
    (re.compile(r"_\s*(?:\\odot(?![A-Za-z])|\{\s*\\odot\s*\})"), "_{sun}"),
    (re.compile(r"\\var(?=(?:phi|epsilon|theta|rho)(?![A-Za-z]))"), r"\\"),
    (re.compile(r"\\(max|min|gcd)\s*\\\{([^{}]*)\\\}"), r"\\\1(\2)"),
    (re.compile(r"\\sqrt\s*\[\s*([0-9]*[13579])\s*\]\s*\{\s*-([^{}+-]*)\}"), r"(-\\sqrt[\1]{\2})"),
    (re.compile(r"\\(?:c?dots|dotsc)(?![A-Za-z])|\.\.\.|…"), r"\\ldots"),
    (re.compile(r"\\(?:[hm]box|text(?:sf|rm)|mathsf)(?![A-Za-z])"), r"\\text"),
    (re.compile(r"(\\(?:mathrm|mathbf|vec|hat|bar|tilde|d?dot)(?![A-Za-z]))\s*([A-Za-z]|\\[a-z]+)"), r"\1{\2}"),
    (re.compile(r"_\s*(?:\\(max|min)(?![A-Za-z])|\{\s*\\(max|min)\s*\})"), r"_{\1\2}"),
    (re.compile(r"^\{-\}"), "-"),
    (re.compile(r"^[^{}]+\\choose(?![A-Za-z])[^{}]+$"), r"{\g<0>}"),
    (re.compile(r"^0(?=[0-9]:[0-5][0-9](?![0-9]))"), ""),
    (re.compile(r"^[fgh]\([a-z]\)\s*\\in(?![A-Za-z])"), r"y\\in "),
    (re.compile(r"(\\ne(?![A-Za-z]))\s*\\pm\s*([^\s,]+)$"), r"\1 \2,-\2"),
    (
        re.compile(r"(?:(?<![0-9.!])([0-9]{1,4})|\(2([a-z])\s*(?:([-+])\s*1)?\s*\))\s*!!(?!!)"),
        lambda found: _double_factorial(*found.groups()),
    ),
    (re.compile(r"\\(?:text|mathrm)\s*\{\s*(\\?[%$])\s*\}"), r"\1"),
    (re.compile(r"_\s*\{\s*\\(?:text|mathrm)\s*\{\s*([A-Za-z]+)\s*\}\s*\}"), r"_{\1}"),
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
    (  # the "if" of a row of cases, or its comma
        re.compile(
            r"(?:,\s*|\\text\s*\{\s*,?\s*\}\s*)?&\s*(?:\\text\s*\{\s*(?:if|for|when)\s*\}|(?:if|for|when)\s)\s*|,\s*&"
        ),
        "&",
    ),
    (
        re.compile(r"\^\s*(?:\\prime(?![A-Za-z])|\{((?:\s*\\prime)+)\s*\})"),
        lambda found: "'" * max(1, (found[1] or "").count("p")),
    ),
    (re.compile(r"\\mathbb\s*([A-Z])|\\([RZNQ])(?![A-Za-z])"), r"\\mathbb{\1\2}"),
    (re.compile(r"(\\mathbb\{Z\})\s*/\s*(?:([0-9]+|[a-z])\s*\\mathbb\{Z\}|([0-9]+)(?![0-9]))"), r"\1_{\2\3}"),
    (re.compile(r"(?<=[A-Za-z}])([_^])\{([A-Za-z0-9*])\}(?![A-Za-z0-9])"), r"\1\2"),
    (re.compile(r",(?:\s*\\q?quad(?![A-Za-z]))+"), ", "),
    (re.compile(r",\s+(?![0-9!\\\s])"), ","),
    (
        re.compile(r"(?<![0-9])[1-9][0-9]{0,2}(?:(?:\\text|\\mathord)?\{,\}[0-9]{3})+(?![0-9])"),
        lambda found: re.sub(r"[^0-9]", "", found[0]),
    ),
    (
        re.compile(r"(\.[0-9]*)\\dot\s*\{([0-9])\}(?:([0-9]*)\\dot\s*\{([0-9])\})?"),
        lambda found: rf"{found[1]}\overline{{{found[2]}{found[3] or ''}{found[4] or ''}}}",
    ),
    (re.compile(r"\\(overline|bar)\s*([0-9])"), r"\\\1{\2}"),
    (re.compile(r"(?<![0-9.])([0-9]+\.[0-9]*)\(([0-9]+)\)(?![0-9(^])"), r"\1\\overline{\2}"),
    (re.compile(r"\{:\}|\\text\s*\{\s*:\s*\}|\\colon(?![A-Za-z])"), ":"),
    (re.compile(r"\\text\s*\{\s*,\s*\}"), ", "),
    (
        re.compile(r"(\\mathbb\{R\}\s*|[)\]]\s*)(?:-|\\(?:backslash|smallsetminus)(?![A-Za-z]))(?=\s*\\\{)"),
        r"\1\\setminus ",
    ),
    (re.compile(r"\\[lr]?vert(?![A-Za-z])|\s*\\mid(?![A-Za-z])\s*"), "|"),
    (re.compile(r"^(\\\{(?:[^|:{}]|\{[^{}]*\})*(?<=[A-Za-z)}]))\s*:\s*(?![\s0-9])"), r"\1|"),  # the set of all that
    (re.compile(r"(?<![A-Za-z\\_])C\(\s*([-+0-9a-z ]+),\s*([-+0-9a-z ]+)\)"), r"\\binom{\1}{\2}"),
    (re.compile(rf"(?:(?<![\w)}}\]])|\{{\}})\s*[_^]\s*{_CHOSEN}\s*C\s*_\s*{_CHOSEN}"), r"\\binom{\1\2}{\3\4}"),
    (
        re.compile(rf"(?:(?<![\w)}}\]])|\{{\}})\s*[_^]\s*{_CHOSEN}\s*P\s*_\s*{_CHOSEN}"),
        r"\\frac{(\1\2)!}{(\1\2-\3\4)!}",
    ),
    # Not C_1^2, which is a constant's square.
    (
        re.compile(
            rf"(?<![\w\\}}])(?:C|\\mathrm\{{C\}})\s*_\s*(?:\{{\s*([0-9]{{2,}}|2?[mn])\s*\}}|([4-9mn]))\s*\^\s*{_CHOSEN}"
        ),
        r"\\binom{\1\2}{\3\4}",
    ),
    (  # a column
        re.compile(
            r"(?<![\w}])[(\[]([^()\[\],]*+,[^()\[\]]*+)[)\]]\s*\^\s*(?:\{\s*(?:T|\\top)\s*\}|T|\\top(?![A-Za-z]))"
        ),
        r"(\1)",
    ),
    (  # only a matrix has a transpose: the parser takes it of numbers too, and e^T for e
        re.compile(r"\^\s*(?:\{\s*(?:T|\\top)\s*\}|T|\\top(?![A-Za-z]))"),
        lambda found: "^T" if r"\begin" in found.string else "^{(T)}",
    ),
    (re.compile(r"\(\s*([A-Z])\s*([A-Z])\s*\)\s*(\^T|\^\s*\{(?:\(T\)|-1)\})"), r"\2\3\1\3"),
    (re.compile(r"\\mathcal\s*(?:\{\s*O\s*\}|O)(?=\s*\()"), "O"),
    (re.compile(r"^(?:\\text\s*\{)?\s*does not exist\s*\}?$", re.IGNORECASE), r"\\text{DNE}"),
    (
        re.compile(r"\\mathbb\{R\}\s*(?:\^|_)\s*\{?\s*([-+]|(?:>|\\ge)\s*0)\s*\}?$"),
        lambda found: "(-\\infty,0)" if found[1] == "-" else ("[" if "g" in found[1] else "(") + "0,\\infty)",
    ),
    (
        re.compile(r"^(?:\\text\s*\{)?\s*(?:no (?:real )?solutions?|(?:the )?empty set)\s*\}?$", re.IGNORECASE),
        r"\\emptyset ",
    ),
    (
        re.compile(
            r"^(?:\\(?:text|mathrm)\s*\{\s*)?(Rs|INR|USD?|EUR)(?:\.|(?<=US)\\?\$)?[\s~}]*(?:\\[ ,;:]\s*)?(?=[0-9.])"
        ),
        lambda found: {"Rs": "₹", "INR": "₹", "EUR": "€"}.get(found[1], r"\$"),
    ),
    (re.compile(r"\((?:\\(?:text|mathrm)\s*\{\s*|\\b)?mod[\s}]*(?:\\[,;:]\s*)?([0-9]+)\s*\)"), r"\\pmod{\1}"),
    (re.compile(r"\\[pb]?mod\s*(?:\{\s*([0-9]+)\s*\}|([0-9]+))"), r"\\pmod{\1\2}"),
    (re.compile(r"^(?:\\text\s*\{)?\s*all real(?:s| numbers)\s*\}?$", re.IGNORECASE), r"\\mathbb{R}"),
    (
        re.compile(
            r"^(?:\\text\s*\{)?\s*all real(?:s| numbers),? except(?: for)?[\s}]*(?:[a-z]\s*=)?([^=]+?)\}?$",
            re.IGNORECASE,
        ),
        r"\\mathbb{R}\\setminus \\{\1\\}",
    ),
    (re.compile(r"(\\pi)\s*(?=\()"), r"\1\\cdot "),  # of one number or letter it is a function to the parser
    (re.compile(rf"^(?:{STYLE}\s*\{{\s*)?(?:(?:[Oo]ption|[Cc]hoice)[\s{{}}]*\(?)?([A-J])[.):]?\s*\}}?$"), r"\1"),
    (re.compile(rf"^{STYLE}\s*\{{\s*(\(?[A-J]\)?(?:(?:\s*,\s*(?:and\s+)?|\s+and\s+)\(?[A-J]\)?)+)\s*\}}$"), r"\1"),
    (re.compile(r"\\log\s*_\s*(?:e(?![A-Za-z])|\{\s*e\s*\})"), r"\\ln "),
    (re.compile(r"(\\text(?:bf)?\s*\{\s*(?:\([A-J]\)|[A-J][.):]))\s*(-?\\?\$?[0-9][0-9.,/]*)\s*\}"), r"\1} \2"),
    (re.compile(r"(?<=[A-Za-z]\([a-z]\))\s*\\equiv(?![A-Za-z])(?!.*mod)"), "="),
    # Sets in a row: x \in (1, 2) or x \in (3, 4), and (-\infty, 1) or (3, \infty), which are no points.
    (re.compile(rf"(?<=[)\]}}])\s*(?:{_IN_TEXT_OR}|\\cup)\s*[A-Za-z]\s*\\in(?![A-Za-z])"), r"\\cup "),
    (
        re.compile(rf"(?<=[)\]])\s*{_IN_TEXT_OR}\s*(?=[(\[])"),
        lambda found: r"\cup " if _OPEN_END.search(found.string) else ",",
    ),
    (
        re.compile(r"^\[\s*(\[[^\[\]]+\](?:,\s*\[[^\[\]]+\])*)\s*\]$"),
        lambda found: rf"\begin{{pmatrix}}{_rows(found[1])}\end{{pmatrix}}",
    ),
    (re.compile(r"\\langle|\\rangle"), lambda found: "(" if found[0] == r"\langle" else ")"),
    (re.compile(r"√\s*(?:\(([^()]*)\)|([0-9]+|[a-z]))"), lambda found: rf"\sqrt{{{found[1] or found[2]}}}"),
    (re.compile(rf"(?!{_UPRIGHT}{_UNIT_LETTER}){STYLE}\s*\{{\s*([0-9][0-9.,]*|[a-z])\s*\}}"), r" \1 "),
    (re.compile(r"(?<=[0-9])\s+_(?=[0-9{])"), "_"),
    (
        re.compile(
            rf"\\frac\s*\{{\s*(?:d|(\\partial))\s*({_SQUARE})?({_VARIABLE})\s*\}}"
            rf"\s*\{{\s*(?:d|\\partial)\s*(\\?[A-Za-z]+)\s*{_SQUARE}?\}}|(?<![A-Za-z\\])d([A-Za-z])/d[a-z](?![A-Za-z])"
        ),
        lambda found: _derivative((found[3] or found[5]) + (f"_{found[4]}" if found[1] else ""), 2 if found[2] else 1),
    ),
    (
        re.compile(rf"({_VARIABLE})('+)(?![st](?![A-Za-z]))"),  # not Fermat's
        lambda found: _derivative(found[1], len(found[2])),
    ),
    (re.compile(r"(\\sqrt\s*\[[^\[\]]*\])\s*([0-9a-z])"), r"\1{\2}"),
    (re.compile(r"\\binom\s*([0-9])\s*([0-9])"), r"\\binom{\1}{\2}"),
    (re.compile(rf"\\frac\s*({_TOKEN})"), r"\\frac{\1}"),
    (re.compile(rf"\\frac\s*(\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}})\s*({_TOKEN})"), r"\\frac\1{\2}"),
    (re.compile(r"\^\s*(-[0-9]+|-[A-Za-z]|e)(?!\.?[0-9])"), r"^{\1}"),
    (re.compile(r"([0-9]+|[A-Za-z])!\s*\^"), r"(\1!)^"),
    (re.compile(r"\\[lr]brace(?![A-Za-z])"), lambda found: r"\{" if found[0] == r"\lbrace" else r"\}"),
    (re.compile(r"(?<=[0-9])\.(?=\s*[/)])"), ""),
    (re.compile(r"^(-?[0-9]+)\{,\}(?=[0-9]{1,2}(?![0-9,{]))|^(-?0)\{,\}(?=[0-9])"), r"\1\2."),
    (re.compile(r"\{,\}|(?<!\\);"), ","),
    (re.compile(r"^([0-9]+)\s*(?:\\text\s*\{\s*to\s*\}|\bto\b)\s*([0-9]+)$"), r"\1:\2"),
    (re.compile(r"(?<=[0-9])\s*/\s*\\text\s*\{"), r"\\text{/"),
    (
        re.compile(r"^([\[\]])([^\[\](){},]+,[^\[\](){},]+)([\[\]])$"),
        lambda found: ("[" if found[1] == "[" else "(") + found[2] + ("]" if found[3] == "]" else ")"),
    ),
    (
        re.compile(
            r"^\\begin\{(cases|aligned)\}((?:\s*&?\s*[A-Za-z]\s*&?\s*=[^=&<>,\\{}]+(?:\\\\|(?=\\end)))+)\\end\{\1\}$"
        ),
        lambda found: ",".join(row.replace("&", "").strip() for row in found[2].split(r"\\") if row.strip()),
    ),
    (re.compile(r"^\\text(?:bf|it|rm)?\s*\{\s*([(\[]?-?\\?\$?[0-9][^{}]*)\}$"), r"\1"),
]
LETTER_IN_TEXT = re.compile(rf"{_UPRIGHT}({_UNIT_LETTER})\s*\}}")
_LOOSE_SPACE = re.compile(r"(?<![A-Za-z])\s+|\s+(?![A-Za-z])")
_UNIT_TEXT = re.compile(r"\\(?:text|mathrm)\s*\{([^{}]*)\}|\\cdot|\\[,;: ]")
_OR = re.compile(r"\s*,?\s*(?:\\text\s*\{\s*,?\s*(and|or)\s*\}|(?<![A-Za-z])(and|or)(?![A-Za-z]))\s*,?\s*")
_LOGIC = re.compile(r"\\(?:(lor|vee|cup)|land|wedge)(?![A-Za-z])")
_FOR_ALL = re.compile(  # what is said of the letters in it
    r"(?:\\forall(?![A-Za-z])|\\text\s*\{[\s,]*(?:for (?:all|any|every|each|some|integers?)|where)\b)([^=]{0,80})$"
    r"|,\s*[A-Za-z]\s*\\in\s*\\mathbb\{R\}$"
)
# Any integer, as of a period: \frac{\pi}{4} + k\pi, k \in \mathbb{Z}; n = 2k + 1 (k \in \mathbb{Z}).
_INTEGER = re.compile(r"(.*?)(?:,|\(|\\text\s*\{[\s,]*for\s*\})\s*([klmn])\s*\\in\s*\\math(?:bb|bf)\{Z\}\)?")
_INEQUALITY = re.compile(r"[<>]|\\(?:le|ge|lt|gt)(?![A-Za-z])")
_CONDITION = re.compile(rf"{_INEQUALITY.pattern}|\\ne(?![A-Za-z])")
_RELATION = re.compile(rf"{_CONDITION.pattern}|=|\\in(?![A-Za-z])")
# What is not said of letters, but which cases an answer is for, or what it is in others.
_BOUNDS = re.compile(rf"(?:{_CONDITION.pattern})\s*-?[0-9.]+|\\in\s*[(\[][^()\[\]]*[)\]]")
_CASES = re.compile(
    r"[0-9+^]|\\frac|(?<![A-Za-z])(?:-|(?:for|where|if|when|else|otherwise|not|each|others?|cases?|odd|even|primes?)"
    r"(?![A-Za-z]))"
)
_UNEQUAL = re.compile(r"([A-Za-z])\s*\\ne(?![A-Za-z])")
# Where a formula has no value: \frac{x+1}{x-1}, x \ne 1.
_RESTRICTED = re.compile(
    r"((?:(?!\\(?:[lg][et]|ne|in|pm)(?![A-Za-z]))[^=<>,])+),\s*([A-Za-z])\s*\\ne(?![A-Za-z])[^=<>]+"
)
_THAT = re.compile(r"\\\{\s*([A-Za-z])\s*(?:\\in\s*(?:\\mathbb\s*\{R\}|R)\s*)?(?:\||:)\s*((?:(?!\\[{}]).)+)\\\}")


def one_spelling(answer: str) -> str:
    """Without delimiters, bold marks, boxes, a final period, and sizes of brackets."""
    answer = _ENTITY.sub(lambda found: unescape(found[0]), answer)
    answer = _SCRIPTS.sub(_script, answer)
    answer = " ".join(_SPACE.sub(" ", answer.translate(_SIGNS)).split())
    text = _without_edges(_inside(_NOISE.sub("", _BOX.sub("", answer))))
    for pattern, same in _SAME:
        text = pattern.sub(same, text)
    if (said := _FOR_ALL.search(text, 1)) and not _CASES.search(_BOUNDS.sub("", said[1] or "")):
        text = text[: said.start()]
    period = _INTEGER.fullmatch(text)
    if period and re.search(rf"{period[2]}\s*\\pi|\\pi\s*{period[2]}|^[nN]\s*=.*{period[2]}", period[1]):
        text = period[1]
    text = _without_edges(text)
    if r"\ldots" in text:  # no parser reads it
        text = _LOOSE_SPACE.sub("", text)
    if (that := _THAT.fullmatch(text)) and _CONDITION.search(that[2]):  # the set of all x that ...
        text = that[2].strip().replace(",", " and ")
    if _LOGIC.search(text) and all(_RELATION.search(part) for part in _LOGIC.sub("\0", text).split("\0")):
        text = _LOGIC.sub(lambda found: " or " if found[1] else " and ", text)
    if (restricted := _RESTRICTED.fullmatch(text)) and re.search(rf"(?<![A-Za-z\\]){restricted[2]}", restricted[1]):
        return restricted[1]
    if (unequal := _UNEQUAL.search(text)) and "=" not in text:  # x \ne 1, 2 and x > 0, x \ne 1 are one condition
        parts = [part for part in re.split(r",|\\land", _OR.sub(",", text)) if not part.endswith(r"\in \mathbb{R}")]
        if all(part.count("(") == part.count(")") for part in parts):
            return r" \land ".join(part if _CONDITION.search(part) else unequal[0] + part for part in parts)
    if _INEQUALITY.search(text):  # there "and" and "or" are not the same
        return _OR.sub(lambda found: "," if "or" in found.groups() else r" \land ", text)
    return _OR.sub(lambda found: ", " if text[found.end() :][:1].isdigit() else ",", text)


def _without_edges(text: str) -> str:
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
        text = _inside(text)
    return text


def _script(found: re.Match[str]) -> str:
    sign = "_" if "₀" <= found[0][0] <= "₉" else "^"
    return f"{sign}{{{normalize('NFKC', found[0])}}}".replace("−", "-")


def _rows(lists: str) -> str:
    return r"\\".join(row.replace(",", "&") for row in re.findall(r"\[([^\[\]]+)\]", lists))


def _root(inside: str | None) -> str:
    return r"\sqrt" if inside is None else rf"\sqrt{{{inside}}}"


def _double_factorial(number: str | None, letter: str, sign: str | None) -> str:
    """7!! is 7 \\cdot 5 \\cdot 3, and to a parser (7!)!."""
    if letter:
        half, top = letter, {None: None, "-": f"2{letter}", "+": f"2{letter}+1"}[sign]
    else:
        whole = int(number or 0)
        half, top = str((whole + 1) // 2), str(whole + 1) if whole % 2 else None
    product = rf"2^{{{half}}}\cdot {half}!"
    return f"({product})" if top is None else rf"\frac{{({top})!}}{{{product}}}"


def _derivative(name: str, order: int) -> str:
    """A name of its own: a parser drops the prime of y', and takes dy/dt for 0."""
    return rf"\dot{{{name}}}" if order == 1 else rf"\ddot{{{name}}}" + (f"_{order}" if order > 2 else "")


def _inside(text: str) -> str:
    """What stands in the braces around all of it, or in a style's: \\mathbf{(1,2)}, \\text{$x^2$}."""
    if styled := _STYLED.match(text):
        braces = text[styled.end() :]
        return text if (inner := _inside(braces)) == braces else inner
    if not (text.startswith("{") and text.endswith("}")) or _INFIX.search(text):
        return text
    depth = 0
    for found in _BRACES.finditer(text):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if depth == 0:
            return text[1:-1].strip() if found.end() == len(text) else text
    return text


def _per(gap: str, units: str, others: str) -> str:
    """A fraction of units on one line."""
    top, bottom = (_UNIT_TEXT.sub(r" \1 ", side).strip() for side in (units, others))
    return rf"{gap}\text{{{top}/{bottom}}}"
