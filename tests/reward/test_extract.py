"""Where the answer of a response is, by answer format."""

import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rloop_mcore.reward
from rloop_mcore.errors import UserError
from rloop_mcore.reward.extract import extract_answer

BOXED = [
    (r"\boxed{5}", "5"),
    (r"so $\boxed{5}$.", "5"),
    (r"\boxed {5}", "5"),
    (r"\boxed{ 5 }", "5"),
    ("\\boxed{5\n}", "5"),
    (r"\boxed{3} then \boxed{7}", "7"),
    (r"\boxed{3} \boxed{7}", "7"),
    (r"\boxed{3}, \boxed{7} and 9", "7"),
    (r"\boxed{5} The final answer is $72$. I hope it is correct.", "5"),
    (r"\boxed{5} Answer: 7", "5"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\frac{1}{\sqrt{2}}} done}", r"\frac{1}{\sqrt{2}}"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
    (r"\boxed{\text{4:30 p.m.}}", r"\text{4:30 p.m.}"),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\boxed{x=\boxed{5}}", r"x=\boxed{5}"),
    (r"\boxed{5} and then \boxed{7", "5"),
    (r"\boxed{\boxed{5}", "5"),
    (r"{ \boxed{5}", "5"),
    (r"} \boxed{5}", "5"),
    (r"x &= 5 \\\boxed{5}", "5"),
    (r"a newline \\boxed{5}", "5"),
    (r"\boxed{5}{", "5"),
    ("\\boxed{\u0665}", "\u0665"),
    (r"so $\boxed 5$.", "5"),
    (r"so \(x = \boxed -3.5\)", "-3.5"),
    (r"\[\boxed 1/2 \]", "1/2"),
    (r"$\boxed{3}$ or $\boxed 5$", r"3 \text{ or } 5"),
    (r"$\boxed 5$ or $\boxed{3}$", r"5 \text{ or } 3"),
    (r"\(x = \boxed{2}\) and \(x = \boxed{3}\)", r"2 \text{ and } 3"),
    (r"\boxed{2}\text{ or }\boxed{3}, or \boxed{4}", r"2 \text{ or } 3 \text{ or } 4"),
    (r"\boxed{3} and \boxed{3}", "3"),
    (r"\boxed{3} or rather \boxed{5}", "5"),
    (r"$\boxed{2}, \boxed{3}$ and $\boxed{5}$", r"2, 3 \text{ and } 5"),
    (r"$x = \boxed{2}$, $x = \boxed{3}$, or $x = \boxed{5}$", r"2, 3 \text{ or } 5"),
    (r"\boxed{1}. \boxed{2}, \boxed{3}", "3"),
    (r"\boxed{1}. \boxed{2} and \boxed{3}", r"2 \text{ and } 3"),
    (r"$\boxed{x = \boxed{5} or \boxed{6}}$", r"x = \boxed{5} or \boxed{6}"),
    (r"$\boxed 5$ or $\boxed{3", "5"),
    (r"$\boxed{x = \boxed 5$}", r"x = \boxed 5$"),
    (r"\boxed{a}" * 1000 + r"\boxed{z}", "z"),
]
NO_BOX = [
    "",
    "5",
    "the answer is 5",
    r"\boxed{",
    r"\boxed{5",
    r"5 = \boxed{}",
    r"\boxed{5} \boxed{}",
    r"\boxed{5} \boxed{  }",
    r"\boxed5",
    r"$\boxed5$",
    r"\boxed 5",
    r"$\boxed 5+3$",
    r"$\boxed 5x$",
    r"$\boxed 5. $",
    r"$\boxed a$",
    r"in \boxed format",
    r"boxed{5}",
    r"\fbox{5}",
    r"\boxed{5\}",
    r"\boxed{{5}",
    r"Answer: 5",
]
ANSWER_LINE = [
    ("Answer: 72", "72"),
    ("Answer:72", "72"),
    ("answer : 72", "72"),
    ("ANSWER: 72", "72"),
    ("**Answer:** 72", "72"),
    ("**Answer: 72**", "72"),
    ("**Answer**: 72", "72"),
    ("Answer: 1\nAnswer: 2", "2"),
    ("Answer: 1,234", "1,234"),
    ("Answer: $72$\n", "$72$"),
    ("Answer: 72 \nso it is 73", "72"),
    ("Final Answer: 72", "72"),
    ("The work.\n\nAnswer: \\frac{1}{2}", r"\frac{1}{2}"),
    ("Answer: `72`", "72"),
    ("Answer:\n72", "72"),  # so DAPO's verifier: Answer\s*:\s*([^\n]+)
    ("**Answer:**\n\n**72**\n", "72"),
    ("Answer:\n\\[\n72\n\\]\nas was to be shown", "\\[\n72\n\\]"),
    ("**Answer:** $$\n72\n$$", "$$\n72\n$$"),
    ("Answer: \\[72", "\\[72"),
]
NO_ANSWER_LINE = [
    "",
    "72",
    "The answer is 72",
    "Answer 72",
    "Answer:",
    "Answer:\n \n",
    "Answer: 72\nAnswer:  ",
    r"\boxed{72}",
]


@pytest.mark.parametrize(("response", "answer"), BOXED)
@pytest.mark.parametrize("truncated", [False, True])
def test_last_complete_box(response: str, answer: str, truncated: bool) -> None:
    assert extract_answer(response, truncated, "boxed") == (answer, "")


@pytest.mark.parametrize("response", NO_BOX)
def test_no_box(response: str) -> None:
    assert extract_answer(response, False, "boxed") == ("", "no_answer")
    assert extract_answer(response, True, "boxed") == ("", "truncated")


@pytest.mark.parametrize(("response", "answer"), ANSWER_LINE)
def test_last_answer_line(response: str, answer: str) -> None:
    assert extract_answer(response, False, "answer_line") == (answer, "")


@pytest.mark.parametrize("response", NO_ANSWER_LINE)
def test_no_answer_line(response: str) -> None:
    assert extract_answer(response, False, "answer_line") == ("", "no_answer")
    assert extract_answer(response, True, "answer_line") == ("", "truncated")


def test_no_group_is_repeated_possessively() -> None:
    """Python before 3.11.5, Debian 12's among it, gives back nothing of a repetition that fails half way (gh-106052):
    (?:a|bc)*+ takes the b of "abd". (?>(?:a|bc)*) is the same, and right there."""
    package = Path(rloop_mcore.reward.__file__).parents[1]
    found = [path.name for path in package.rglob("*.py") if re.search(r"[^\\[]\)[*+?]\+", path.read_text())]
    assert found == []


def test_a_line_that_the_cut_may_have_shortened_is_no_answer() -> None:
    assert extract_answer("Answer: 7", True, "answer_line") == ("", "truncated")
    assert extract_answer("Answer: 7\n", True, "answer_line") == ("7", "")


@pytest.mark.parametrize(
    "response",
    ["\\boxed{" * 50_000, "{" * 100_000 + "}" * 100_000, "answer:" * 50_000, "\\boxed{" + "\\" * 400_000],
)
def test_long_garbage_is_read_in_one_pass(response: str) -> None:
    start = time.process_time()
    for answer_format in ("boxed", "answer_line"):
        assert extract_answer(response, True, answer_format) == ("", "truncated")
    assert time.process_time() - start < 5  # of 0.1; in the square of the length it is 20


def _last_box(text: str) -> str:
    """What `last_box` finds, a character at a time from the first one on."""
    stack: list[int | None] = []  # where a box's content starts, None for another brace
    answer, at = "", 0
    while at < len(text):
        name = text[at:].lstrip("\\")
        after = name.removeprefix("boxed").lstrip()
        if text[at] == "\\" and name.startswith("boxed") and after.startswith("{"):
            at = len(text) - len(after) + 1
            stack.append(at)
            continue
        if text[at] == "}" and stack and (start := stack.pop()) is not None:
            answer = text[start:at].strip()
        elif text[at] == "{":
            stack.append(None)
        at += 2 if text[at] == "\\" else 1
    return answer


@given(st.lists(st.sampled_from(["\\", "\\\\", "{", "}", "}", "boxed", "\\boxed{", " ", "a", "\n"]), max_size=20))
@settings(max_examples=500)
def test_the_box_is_the_one_that_a_reader_finds(parts: list[str]) -> None:
    text = "".join(parts)
    assert extract_answer(text, False, "boxed")[0] == _last_box(text)


def test_unknown_format() -> None:
    with pytest.raises(UserError, match=r"reward.answer_format='box'.*boxed or answer_line"):
        extract_answer("5", False, "box")
