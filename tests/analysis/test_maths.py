import re
import time
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rloop_mcore.analysis.maths import MARK, Formulas, to_mathml


def found(text: str) -> list[str]:
    formulas = Formulas(100)
    formulas.mark(text)
    return [latex for latex, _ in formulas.table]


@pytest.mark.parametrize(
    ("text", "formulas"),
    [
        (r"so $x^2$ and \(y\) are", ["$x^2$", r"\(y\)"]),
        (r"\[ a \] $$ b $$", [r"\[ a \]", "$$ b $$"]),
        (r"the answer is \boxed{\frac{1}{\sqrt{2}}}.", [r"\boxed{\frac{1}{\sqrt{2}}}"]),
        (r"He pays $5 for two and $6 for three.", []),
        (r"It costs \$5 and \$6.", []),
        ("an open $x and no more", []),
    ],
)
def test_what_is_a_formula(text: str, formulas: list[str]) -> None:
    assert found(text) == formulas


def test_numbers_lead_back_to_the_text() -> None:
    formulas = Formulas(100)
    text = r"First $a+b$, then \boxed{3}, then $a+b$ again."
    parts = formulas.mark(text).split(MARK)
    assert "".join(formulas.table[int(part)][0] if i % 2 else part for i, part in enumerate(parts)) == text
    assert len(formulas.table) == 2


def test_marks_that_nothing_closes_take_no_time() -> None:
    begun = time.perf_counter()
    for mark in (r"\[", r"\(", r"\boxed{"):
        assert found(mark * 20_000) == []
    assert time.perf_counter() - begun < 5
    assert found(rf"\[ {'x ' * 300} \]") == []  # too long to be worth it


def test_past_the_limit_formulas_stay_latex() -> None:
    formulas = Formulas(1)
    formulas.mark("$a$ $b$")
    assert [bool(mathml) for _, mathml in formulas.table] == [True, False]


def test_mathml_says_what_the_latex_said() -> None:
    fraction = ElementTree.fromstring(to_mathml(r"\frac{12}{x}")).find(".//mfrac")
    assert fraction is not None
    assert ["".join(child.itertext()) for child in fraction] == ["12", "x"]
    assert 'display="block"' in to_mathml("x", display=True)


@pytest.mark.parametrize(
    "latex",
    [
        r"\href{javascript:alert(1)}{x}",
        r"\text{<img src=x onerror=f()>}",
        r"\style{background:url(//x)}{y}",
        "<b>",
    ],
)
def test_nothing_that_loads_or_runs_comes_through(latex: str) -> None:
    assert not re.search(r"<(?!/?m|/?none)|href|style=|\son\w+=\"", to_mathml(latex))


@given(st.text("\\{}^_$&ab1 <>\"'frac", max_size=30))
@settings(max_examples=200)
def test_whatever_a_model_writes_is_well_formed_or_left_alone(latex: str) -> None:
    mathml = to_mathml(latex)
    if mathml:
        assert ElementTree.fromstring(mathml).tag == "math"
