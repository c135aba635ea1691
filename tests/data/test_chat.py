"""The tokenizer's chat template against transformers' own rendering of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rloop_mcore.data.prompts import TemplatePrompts
from rloop_mcore.data.templates import FOLDER, PromptTemplate
from rloop_mcore.data.tokenizer import TextTokenizer
from rloop_mcore.errors import UserError
from rloop_mcore.types import Problem
from tests.data.chat_tokenizer import CHATML, write_chat_tokenizer

BOS, END_OF_TEXT, IM_START, IM_END = range(4)
PROBLEM = 'Is $\\frac{1}{2} < x$ & "y"? {{ messages }} é'
# Each does something that another one doesn't; none is a model's own.
WITH_BOS = """{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}{% endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}"""
WITH_TAG = """{% for m in messages %}
    {% if loop.index > 9 %}{% break %}{% endif %}
    {%- if m.role == 'assistant' %}
    {% generation %}
    A: {{ m.content }}<|im_end|>
    {% endgeneration %}
    {% else %}
    {% set who = namespace(name='U') %}
Q: {{ who.name }} {{ m.content }}{{ tools }}{{ documents }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}A:{% endif %}"""
WITH_JSON = (
    """{{ messages | tojson }}{{ unk_token }}{{ messages[0] | tojson(indent=1) }}{{ 'A:' if add_generation_prompt }}"""
)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def template(folder: Path, tokenizer: TextTokenizer, head: str = "{% set chat = true %}") -> PromptTemplate:
    return PromptTemplate(write(folder / "mine.jinja", head + "\n{{ problem }}\nThink.\n"), tokenizer)


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}])
@pytest.mark.parametrize(
    "chat_template",
    [
        CHATML,
        WITH_BOS,
        WITH_TAG,
        WITH_JSON,
        [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}],
    ],
)
def test_prompts_are_what_transformers_makes(
    tmp_path: Path, chat_template: object, variables: dict[str, Any], system: str | None
) -> None:
    tokenizer = write_chat_tokenizer(tmp_path, chat_template)
    head = f"{{% set chat = {json.dumps(variables) if variables else 'true'} %}}"
    head += f'\n{{% set system = "{system}" %}}' if system else ""
    ours = template(tmp_path, tokenizer, head)
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": f"{PROBLEM}\nThink."}]
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **variables)
    assert ours.render(PROBLEM) == text
    problem = Problem("p", PROBLEM, "1")
    prompts = TemplatePrompts([problem], tokenizer, ours, 0, 9999)
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **variables)
    assert list(prompts.prompts[0].ids) == ids


def test_the_template_alone_writes_the_bos(tmp_path: Path) -> None:
    problem, tokenizer = Problem("p", "1 + 1?", "2"), write_chat_tokenizer(tmp_path, WITH_BOS)
    prompts = TemplatePrompts([problem], tokenizer, PromptTemplate("chat", tokenizer), 0, 999)
    assert prompts.prompts[0].ids.count(BOS) == 1
    tokenizer = write_chat_tokenizer(tmp_path)  # whose template has none, though the tokenizer would add one
    prompts = TemplatePrompts([problem], tokenizer, PromptTemplate("chat", tokenizer), 0, 999)
    assert BOS not in prompts.prompts[0].ids
    assert prompts.prompts[0].ids[0] == IM_START


@pytest.mark.parametrize(
    ("chat_template", "eos", "stop", "end"),
    [
        (CHATML, [IM_END, END_OF_TEXT], (), IM_END),
        (CHATML, IM_END, (), IM_END),
        (CHATML, END_OF_TEXT, ("<|im_end|>",), IM_END),  # a base model's files
        (CHATML, None, ("<|im_end|>",), IM_END),
        (WITH_BOS, [END_OF_TEXT], (), END_OF_TEXT),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", None, (), END_OF_TEXT),  # no token: the tokenizer's
        (  # nor is what begins the next answer the end of this one
            "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}",
            None,
            (),
            END_OF_TEXT,
        ),
    ],
)
def test_a_response_ends_where_the_turn_does(
    tmp_path: Path, chat_template: str, eos: object, stop: tuple[str, ...], end: int
) -> None:
    tokenizer = write_chat_tokenizer(tmp_path, chat_template, eos)
    ours = template(tmp_path, tokenizer)
    assert (ours.stop, ours.end) == (stop, end)
    problem = Problem("p", "1 + 1?", "2", meta={"solution": "2"})
    example = TemplatePrompts([problem], tokenizer, ours, 0, 999).example(problem)
    assert example.response_ids == (*tokenizer.encode("2", special_tokens=False), end)
    declared = template(tmp_path, tokenizer, '{% set chat = true %}{% set stop = ["END"] %}')
    assert declared.stop == ("END", *stop)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_the_ends_of_both_files_count(tmp_path: Path, file: str) -> None:
    tokenizer = write_chat_tokenizer(tmp_path)
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text(f'{{"eos_token_id": {END_OF_TEXT}}}')
    assert template(tmp_path, tokenizer).stop == ("<|im_end|>",)
    (tmp_path / file).write_text(f'{{"eos_token_id": [{IM_END}]}}')
    assert template(tmp_path, tokenizer).stop == ()


def test_long_chats_are_counted_and_left_out(tmp_path: Path) -> None:
    tokenizer = write_chat_tokenizer(tmp_path)
    problems = [Problem(f"p{n}", "x" * n, "1") for n in (1, 2, 50)]
    ours = PromptTemplate("chat", tokenizer)
    limit = len(tokenizer.encode(ours.render("xx"), special_tokens=False))
    prompts = TemplatePrompts(problems, tokenizer, ours, 0, limit)
    assert [prompt.problem.id for prompt in prompts.prompts] == ["p1", "p2"]
    assert prompts.too_long == 1


def test_a_date_stays_the_same(tmp_path: Path) -> None:
    dated = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"
    assert template(tmp_path, write_chat_tokenizer(tmp_path, dated)).render("x") == "26 Jul 2024 x\nThink."


def test_its_text_tells_templates_apart(tmp_path: Path) -> None:
    texts = {template(tmp_path, write_chat_tokenizer(tmp_path, source)).text for source in (CHATML, WITH_BOS)}
    plain = PromptTemplate("r1_zero", write_chat_tokenizer(tmp_path))
    assert len(texts) == 2
    assert plain.text == (FOLDER / "r1_zero.jinja").read_text()  # kept samples are found by it


@pytest.mark.parametrize(
    ("chat_template", "head", "message"),
    [
        (None, "{% set chat = true %}", r"has no chat template, which data\.template asks for"),
        ([{"name": "tool_use", "template": "x"}], "{% set chat = true %}", "has no chat template"),
        (["x"], "{% set chat = true %}", "has no chat template"),
        ("{% if %}", "{% set chat = true %}", r"chat_template\.jinja is not a Jinja template"),
        ("{{ raise_exception('no such role') }}", "{% set chat = true %}", "refuses the messages: no such role"),
        ("{{ messages[0].content + 1 }}", "{% set chat = true %}", "refuses the messages: can only concatenate"),
        ("{{ ''.__class__.__mro__ }}", "{% set chat = true %}", "refuses the messages.*unsafe"),
        ("nothing", "{% set chat = true %}", "does not use problem"),
        (CHATML, "{% set chat = 3 %}", "chat must be true, false or a mapping, not 3"),
        (CHATML, '{% set system = "s" %}', "system must be a string, and needs {% set chat = true %}"),
        (CHATML, "{% set chat = true %}{% set system = 3 %}", "system must be a string"),
    ],
)
def test_what_cannot_be_rendered_is_said(tmp_path: Path, chat_template: object, head: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        template(tmp_path, write_chat_tokenizer(tmp_path, chat_template), head)


def test_a_chat_template_that_is_no_text_is_refused(tmp_path: Path) -> None:
    tokenizer = write_chat_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"chat_template\.jinja has to be UTF-8 text \(invalid start byte, byte 0\)"):
        template(tmp_path, tokenizer)
