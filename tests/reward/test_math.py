"""Which answers the math verifier takes for equal: written by hand, by kind of answer."""

import pytest

from rloop_mcore.reward.math import compare, grade_math
from rloop_mcore.types import Problem, Verdict

EQUAL = [
    # integers and decimals
    ("72", "72"),
    ("72", "72.0"),
    ("72", "+72"),
    ("-5", "-5"),
    ("7", "007"),
    ("0.5", ".5"),
    ("72", "72."),
    # fractions and mixed numbers
    (r"\frac{1}{2}", r"\dfrac{1}{2}"),
    (r"\frac{1}{2}", r"\frac12"),
    (r"\frac{1}{2}", "1/2"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", r"\frac{2}{4}"),
    (r"-\frac{3}{4}", r"\frac{-3}{4}"),
    (r"\frac{3}{2}", r"1\frac{1}{2}"),
    # roots and powers
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    (r"\sqrt[3]{8}", "2"),
    ("2^{10}", "1024"),
    ("10^{-3}", "0.001"),
    # expressions and equations
    ("(x+1)^2", "x^2+2x+1"),
    ("x(x-1)", "x^2-x"),
    (r"\sin^2 x+\cos^2 x", "1"),
    ("5", "x=5"),
    ("x=5", "5"),
    ("y=2x+1", "2x+1=y"),
    (r"\pi", r"\pi"),
    (r"\frac{\pi}{2}", r"0.5\pi"),
    # intervals, sets, tuples
    ("[0,1)", "[0, 1)"),
    (r"(-\infty,3]", r"\left(-\infty, 3\right]"),
    (r"[1,2]\cup[3,4]", r"[3,4]\cup[1,2]"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("1,2", "2, 1"),
    ("1,2", r"1 \text{ and } 2"),
    ("(1,2)", "(1, 2)"),
    (r"(3,\frac{\pi}{2})", r"\left(3, \frac{\pi}{2}\right)"),
    ("(1,2,3)", r"\left( 1, 2, 3 \right)"),
    # matrices
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\begin{pmatrix}1&0\\0&1\end{pmatrix}", r"\begin{bmatrix}1&0\\0&1\end{bmatrix}"),
    (r"\begin{pmatrix}1/2&0\\0&1\end{pmatrix}", r"\begin{pmatrix}0.5&0\\0&1\end{pmatrix}"),
    # percent, units, degrees, currency
    ("50", r"50\%"),
    (r"50\%", "50%"),
    (r"\frac{1}{2}", r"50\%"),
    (r"12.5\%", "0.125"),
    ("3", r"3 \text{ cm}^2"),
    ("5", "5 km"),
    ("90", r"90^\circ"),
    (r"90^{\circ}", "90"),
    (r"45^\circ", r"45\text{ degrees}"),
    ("18", r"\$18"),
    ("18", "$18"),
    ("18", "18 dollars"),
    ("3.50", r"\$3.50"),
    # thousands separators
    ("10000", "10,000"),
    (r"10{,}000", "10000"),
    ("1234567", "1,234,567"),
    ("1234", "1 234"),
    ("1234", r"1\,234"),
    ("1234.5", "$1,234.50"),
    # complex numbers
    ("2+3i", "3i+2"),
    ("(1+i)^2", "2i"),
    ("1+2i", "2i+1"),
    ("1+i", "1i+1"),
    ("-1", "i^2"),
    (r"\{i,-i\}", r"\{-i, i\}"),
    (r"\pm i", r"\pm i"),
    (r"\sum_{i=1}^{3} i", "6"),
    # number words
    ("5000000", "5 million"),
    ("2000", r"2\text{ thousand}"),
    # text and choices
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{Evelyn}", r"\text{ evelyn }"),
    (r"\text{east}", r"\mathrm{east}"),
    (r"\text{(C)}", "C"),
    ("C", r"\textbf{(C)}"),
    (r"\text{4:30 p.m.}", r"4:30 \text{ p.m.}"),
    (r"\text{even}", "Even."),
    # what surrounds an answer
    ("72", "$72$"),
    ("72", r"\(72\)"),
    ("72", "**72**"),
    ("72", r"\boxed{72}"),
]

DIFFERENT = [
    ("72", "73"),
    ("72", "-72"),
    ("72", "7.2"),
    ("72", "720"),
    ("0.33", r"\frac{1}{3}"),
    (r"\frac{1}{2}", r"\frac{1}{3}"),
    (r"\frac{1}{2}", r"\frac{2}{1}"),
    (r"\frac{3}{2}", r"\frac{1}{2}"),
    (r"2\sqrt{3}", r"\sqrt{6}"),
    (r"\sqrt{2}", "1.41"),
    (r"\sqrt{2}", "2"),
    ("2^{10}", "20"),
    ("10^{-3}", "10^{3}"),
    ("(x+1)^2", "x^2+1"),
    ("x+1", "y+1"),
    ("x=5", "y=5"),
    (r"\pi", "3.14"),
    ("[0,1)", "[0,1]"),
    ("[0,1)", "(0,1)"),
    (r"(-\infty,3]", r"(-\infty,3)"),
    (r"[1,2]\cup[3,4]", "[1,4]"),
    (r"\{1,2\}", r"\{1,3\}"),
    (r"\{1,2\}", r"\{1\}"),
    ("1,2", "1"),
    ("2", "1,2"),
    ("(1,2)", "(2,1)"),
    ("(1,2,3)", "(1,2)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    (r"\begin{pmatrix}1&0\\0&1\end{pmatrix}", r"\begin{pmatrix}1&0\\0&2\end{pmatrix}"),
    ("50", r"5\%"),
    (r"50\%", "5"),
    ("90", r"9^\circ"),
    ("18", r"\$19"),
    ("10000", "1,000"),
    ("1234", "1 235"),
    ("235", "1 234"),
    ("2+3i", "2-3i"),
    ("i", "-i"),
    ("2i", "2"),
    (r"\text{Evelyn}", "Briana"),
    (r"\text{east}", "seat"),
    ("(C)", "(D)"),
    (r"\text{4:30 p.m.}", r"4:30 \text{ a.m.}"),
    (r"\text{even}", "odd"),
    ("6", r"5 \text{ or maybe } 6"),
    ("6", "5 or 6"),
    ("5", "5 million"),
    ("5", r"5 \text{ million}"),
    ("3", r"\infty"),
]


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_equal(gold: str, answer: str) -> None:
    assert compare(gold, answer) == Verdict(True, "correct")


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different(gold: str, answer: str) -> None:
    assert not compare(gold, answer).correct


@pytest.mark.parametrize(
    ("response", "truncated", "answer_format", "reason"),
    [
        (r"so \boxed{72}", False, "boxed", "correct"),
        (r"so \boxed{72}, that is", True, "boxed", "correct"),
        (r"so \boxed{73}", False, "boxed", "wrong"),
        (r"\boxed{71} or rather \boxed{72}", False, "boxed", "correct"),
        (r"\boxed{72} or rather \boxed{71}", False, "boxed", "wrong"),
        (r"\boxed{72} \boxed{71}", False, "boxed", "wrong"),
        (r"\boxed{71}. The final answer is $72$. I hope it is correct.", False, "boxed", "wrong"),
        (r"\boxed{72}. The final answer is $71$. I hope it is correct.", False, "boxed", "correct"),
        ("the answer is 72", False, "boxed", "no_answer"),
        ("the answer is 72, because", True, "boxed", "truncated"),
        (r"72 \boxed{7", True, "boxed", "truncated"),
        (r"72 = \boxed{}", False, "boxed", "no_answer"),
        (r"\boxed{\frac{}{}}", False, "boxed", "unparsable"),
        ("Answer: 72", False, "answer_line", "correct"),
        ("Answer: $1,072.00", False, "answer_line", "wrong"),
        ("The answer is 72", False, "answer_line", "no_answer"),
        (r"\boxed{72}", False, "answer_line", "no_answer"),
        ("Answer: 7", True, "answer_line", "truncated"),
        ("Answer: 72\nand so", True, "answer_line", "correct"),
    ],
)
def test_verdict_on_a_whole_response(response: str, truncated: bool, answer_format: str, reason: str) -> None:
    verdict = grade_math(Problem("p", "", "72"), response, truncated, answer_format)
    assert verdict == Verdict(reason == "correct", reason)
