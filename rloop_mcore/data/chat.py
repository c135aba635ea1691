"""The chat template of a tokenizer: the Jinja text in its folder that writes messages as the model learnt to read them.

Rendered as transformers' `apply_chat_template` does it (which would cost seconds to import), with one difference: a
template that asks for today's date gets a fixed one, so that the prompts of a run don't change overnight.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rloop_mcore.data.tokenizer import TextTokenizer
from rloop_mcore.errors import UserError

TODAY = date(2024, 7, 26)  # what Llama 3's templates fall back to

_ANSWER = "ANSWER"

Messages = Sequence[Mapping[str, str]]


def in_words(error: Exception) -> str:
    """What a template's failure says of itself, and in which line its text is wrong; some say nothing."""
    where = f"line {error.lineno}: " if isinstance(error, TemplateSyntaxError) else ""
    return where + (str(error) or type(error).__name__)


class ChatTemplate:
    """The chat template of a tokenizer's folder: `chat_template.jinja`, else that of tokenizer_config.json.

    `text`: all that a rendering depends on besides the messages and variables. Raises UserError if there is none, or
    none that Jinja understands.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        source, self._where = _source(tokenizer)
        self.text = source + json.dumps(tokenizer.special_tokens)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": TODAY.strftime}
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError) as error:
            raise UserError(f"the chat template of {self._where} is not a Jinja template: {in_words(error)}") from None

    def render(self, messages: Messages, variables: Mapping[str, Any], answered: bool = False) -> str:
        """The messages as text, up to where the model's answer begins, or to the end of the last one if `answered`.

        variables: what the template may know besides, e.g. `enable_thinking`. Raises UserError where it refuses.
        """
        known = {**self._tokenizer.special_tokens, "tools": None, "documents": None, **variables}
        try:
            return self._template.render(messages=messages, add_generation_prompt=not answered, **known)
        except Exception as error:  # a template is a program, which can fail in any way
            raise UserError(f"the chat template of {self._where} refuses the messages: {in_words(error)}") from None

    def end_of_answer(self, messages: Messages, variables: Mapping[str, Any]) -> tuple[int, str] | None:
        """The special token, id and text, that the template writes after an answer to `messages`; None for none."""
        text = self.render([*messages, {"role": "assistant", "content": _ANSWER}], variables, answered=True)
        first = self._tokenizer.encode(text.rpartition(_ANSWER)[2].lstrip(), special_tokens=False)[:1]
        token = self._tokenizer.special(first[0]) if first else None
        return (first[0], token) if token is not None else None


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks an answer for those who train on it: nothing to a prompt."""

    tags = {"generation"}  # noqa: RUF012  (Jinja declares it of instances)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _source(tokenizer: TextTokenizer) -> tuple[str, Path]:
    """The template's text, and the file it is in."""
    file = tokenizer.folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8"), file
        except UnicodeDecodeError as error:
            raise UserError(f"{file} has to be UTF-8 text ({error.reason}, byte {error.start})") from None
    stated = tokenizer.config.get("chat_template")
    if isinstance(stated, list):  # several, by name
        named = [entry for entry in stated if isinstance(entry, dict)]
        stated = next((entry.get("template") for entry in named if entry.get("name") == "default"), None)
    if not isinstance(stated, str):
        raise UserError(
            f"the tokenizer of {tokenizer.folder} has no chat template, which data.template asks for: choose another "
            "template, or put a chat_template.jinja into that folder"
        )
    return stated, tokenizer.folder / "tokenizer_config.json"


def _to_json(value: Any, indent: int | None = None, **settings: Any) -> str:
    """Unlike Jinja's own filter it escapes nothing for HTML."""
    return json.dumps(value, ensure_ascii=settings.pop("ensure_ascii", False), indent=indent, **settings)


def _refuse(message: str) -> None:
    raise TemplateError(message)
