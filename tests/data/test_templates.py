"""The shipped templates against golden renderings.

Regenerate after a wanted change and read the diff: RLOOP_UPDATE_GOLDEN=1 pytest tests/data/test_templates.py
"""

import os
from pathlib import Path

import pytest

from rloop_mcore.data.templates import PromptTemplate, asks_for, template_names
from rloop_mcore.data.tokenizer import TextTokenizer
from rloop_mcore.errors import UserError
from tests.data.chat_tokenizer import write_chat_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "templates"
PROBLEM = 'What is $\\frac{1}{2} < x$ & "y"? {{ not a tag }}'  # must come out as it is: nothing escaped or evaluated


@pytest.fixture
def tokenizer(tmp_path: Path) -> TextTokenizer:
    return write_chat_tokenizer(tmp_path)


def test_every_wanted_template_is_shipped() -> None:
    assert set(template_names()) == {"chat", "countdown", "dapo", "gsm8k_fewshot", "qwen25_math_cot", "r1_zero"}


def test_a_templates_words_say_which_answer_format_they_ask_for(tmp_path: Path) -> None:
    boxed, line = dict.fromkeys(("chat", "qwen25_math_cot", "r1_zero"), "boxed"), "answer_line"
    assert {name: asks_for(name) for name in template_names()} == boxed | {
        **dict.fromkeys(("dapo", "gsm8k_fewshot"), line),
        "countdown": None,
    }
    mine = tmp_path / "mine.jinja"
    for text, asked in (
        ("{{ problem }}\nAnswer:", None),  # a response begins there, with a box perhaps
        ("Answer, in \\boxed{}: {{ problem }}", "boxed"),
        ("{{ problem }} End with Answer: \\boxed{...}", None),
        ("{{ problem }} End with\nanswer: ...", line),
    ):
        mine.write_text(text)
        assert asks_for(str(mine)) == asked, text
    mine.write_bytes(b"\xff {{ problem }}")
    assert asks_for(str(mine)) is None


@pytest.mark.parametrize("name", template_names())
def test_golden(name: str, tokenizer: TextTokenizer) -> None:
    template = PromptTemplate(name, tokenizer)
    rendered = f"{template.render(PROBLEM)}\n=== stop: {list(template.stop)!r}\n"
    golden = GOLDEN / f"{name}.txt"
    if os.environ.get("RLOOP_UPDATE_GOLDEN"):
        golden.write_text(rendered, encoding="utf-8")
    assert rendered == golden.read_text(encoding="utf-8")
    assert PROBLEM in rendered


def test_a_users_file(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text('{% set stop = ["\\n\\n", "END"] %}\nQ: {{ problem }}\nA:\n')
    template = PromptTemplate(str(path), tokenizer)
    assert template.render("1 + 1?") == "Q: 1 + 1?\nA:"
    assert template.stop == ("\n\n", "END")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ problem", "end of print statement"),
        ("{{ answer }}", "'answer' is undefined"),
        ("{{ problem.__class__.__mro__ }}", "unsafe"),
        ('{% set stop = "END" %}{{ problem }}', "stop must be a list of non-empty strings"),
        ('{% set stop = ["END", ""] %}{{ problem }}', "stop must be a list of non-empty strings"),
        ("{% set stop = [7] %}{{ problem }}", "stop must be a list of non-empty strings"),
        ("{% include 'x' %}", "no loader"),
        ("Solve it.", "does not use problem"),
        ("{{ 1 / 0 }}{{ problem }}", "division by zero"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}{{ problem }}", "recursion"),
        ("{% for i in range(1000000000) %}{% endfor %}{{ problem }}", "Range too big"),
        ("{{ problem * 100000000000000000 }}", "MemoryError"),
    ],
)
def test_a_bad_template_is_refused_by_name(tmp_path: Path, tokenizer: TextTokenizer, text: str, message: str) -> None:
    path = tmp_path / "bad.jinja"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"bad\.jinja.*{message}"):
        PromptTemplate(str(path), tokenizer)


def test_a_problem_that_a_template_fails_at_is_named(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{% if problem == '2 + 2' %}{{ answer }}{% endif %}{{ problem }}")
    template = PromptTemplate(str(path), tokenizer)
    with pytest.raises(UserError, match=r"mine\.jinja: 'answer' is undefined \(of the problem '2 \+ 2'\)"):
        template.render("2 + 2")


def test_an_unknown_name_lists_the_known_ones(tokenizer: TextTokenizer) -> None:
    with pytest.raises(UserError, match=r"'r1zero' not found; it must be one of chat, countdown, .*r1_zero"):
        PromptTemplate("r1zero", tokenizer)
