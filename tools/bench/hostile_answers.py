"""Answers that do to a verifier what a policy under training sooner or later does, as whole boxed responses, seeded."""

from __future__ import annotations

import random
from collections.abc import Callable

_DIGITS = "٠١٢٣٤٥٦٧٨٩", "０１２３４５６７８９", "𝟎𝟏𝟐𝟑𝟒𝟓𝟔𝟕𝟖𝟗"

Maker = Callable[[random.Random], str]

KINDS: dict[str, Maker] = {
    "nested powers": lambda draw: "^{".join(str(draw.randint(2, 99)) for _ in range(draw.randint(3, 9))) + "}" * 8,
    "factorials": lambda draw: f"{draw.randint(10**4, 10**9)}{'!' * draw.randint(1, 4)}",
    "long number": lambda draw: str(draw.randint(1, 9)) * draw.randint(10_000, 100_000),
    "long text": lambda draw: draw.choice(["the answer is ", r"\text{a}", "x+", "1,", " ", "\\", "9a"]) * 20_000,
    "deep brackets": lambda draw: (n := draw.randint(50, 40_000)) * "(" + "1" + n * ")",
    "deep fractions": lambda draw: (n := draw.randint(20, 400)) * r"\frac{1}{1+" + "x" + n * "}",
    "deep roots": lambda draw: (n := draw.randint(20, 400)) * r"\sqrt{2+" + "2" + n * "}",
    "huge matrix": lambda draw: (
        r"\begin{pmatrix}" + r"\\".join(["&".join(["1"] * (n := draw.randint(5, 60)))] * n) + r"\end{pmatrix}"
    ),
    "huge set": lambda draw: r"\{" + ",".join(map(str, range(draw.randint(50, 3000)))) + r"\}",
    "NUL and surrogates": lambda draw: "".join(
        draw.choice(["\0", "\ud800", "\udfff", "7", "\u2028", "\x1b"]) for _ in range(40)
    ),
    "unbalanced": lambda draw: "".join(
        draw.choice(["{", "}", r"\frac", r"\left(", "$", r"\]", "7", "^"]) for _ in range(60)
    ),
    "Unicode digits": lambda draw: "".join(draw.choice(draw.choice(_DIGITS)) for _ in range(draw.randint(1, 30))),
    "sums": lambda draw: rf"\sum_{{k=1}}^{{{10 ** draw.randint(3, 12)}}} \frac{{1}}{{k^{draw.randint(1, 9)}+k!}}",
    "products": lambda draw: rf"\prod_{{k=1}}^{{{10 ** draw.randint(3, 9)}}} (k^{draw.randint(2, 99)}+1)",
    "integrals": lambda draw: (
        rf"\int_0^{{\infty}} \frac{{\sin(x^{draw.randint(2, 9)})e^{{-x}}}}{{\ln(1+x^{draw.randint(2, 9)})}} dx"
    ),
    "limits": lambda draw: rf"\lim_{{x\to\infty}} (1+\frac{{1}}{{x^{{x^{draw.randint(2, 9)}}}}})^{{x!}}",
    "expansions": lambda draw: rf"(a+b+c+d+e_1)^{{{draw.randint(50, 5000)}}}-(x+y+z)^{{{draw.randint(50, 999)}}}",
    "towers of logs": lambda draw: r"\ln(" * draw.randint(5, 60) + "2" + ")" * 60,
    "polynomial equation": lambda draw: f"x^{draw.randint(20, 400)}+{draw.randint(2, 9)}x^{draw.randint(3, 19)}-1=0",
    "inequalities": lambda draw: f"x^{draw.randint(5, 30)}-3x^{draw.randint(2, 4)}+1>{draw.randint(1, 9)}",
    "repeated words": lambda draw: "wait " * draw.randint(10, 5000) + "5",
    "trigonometry": lambda draw: "+".join(
        rf"\sin^{{{draw.randint(2, 40)}}}({n}x)" for n in range(1, draw.randint(5, 30))
    ),
}
GOLDS = [
    "7",
    r"\frac{1}{2}",
    r"\sqrt{2}",
    "x^2+1",
    "(1,2)",
    r"\{1,2\}",
    "[0,1)",
    r"\begin{pmatrix}1\\2\end{pmatrix}",
    "x=5",
    "x>3",
]


def hostile(count: int) -> list[tuple[str, str, str]]:
    """`count` (kind, gold, response), every kind in turn."""
    draw = random.Random("hostile/0")
    kinds = list(KINDS)
    rows = []
    for n in range(count):
        kind = kinds[n % len(kinds)]
        rows.append((kind, draw.choice(GOLDS), rf"so \boxed{{{KINDS[kind](draw)}}}"))
    return rows
