"""Prompt templates: small Jinja files that turn a problem's text into the prompt's.

A template sees one variable, `problem`. It may declare

    {% set stop = ["..."] %}   strings at which a response ends
    {% set chat = true %}      its text is a user's message, to be put into the tokenizer's chat template; or a mapping
                               of what that template is to know: {% set chat = {"enable_thinking": false} %}
    {% set system = "..." %}   the system's message before it

Other variables are refused. One newline at the end of the file is not part of the prompt.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rloop_mcore.data.chat import ChatTemplate, in_words
from rloop_mcore.data.tokenizer import TextTokenizer
from rloop_mcore.errors import UserError
from rloop_mcore.platform.files import read_json

FOLDER = Path(__file__).parent / "templates"

_TRIAL = "1 + 1 = ?"
_ANSWER_LINE = re.compile(r"\banswer:\s*\S", re.IGNORECASE)  # not where the response begins, which may be a box


def template_names() -> list[str]:
    """The names of the shipped templates."""
    return sorted(path.stem for path in FOLDER.glob("*.jinja"))


def template_file(name: str) -> Path:
    """The file of a shipped template, or a user's `.jinja` file. Raises UserError where there is none."""
    path = Path(name) if name.endswith(".jinja") else FOLDER / f"{name}.jinja"
    if not path.is_file():
        raise UserError(
            f"data.template {name!r} not found; it must be one of {', '.join(template_names())}, "
            "or the path of a .jinja file"
        )
    return path


def asks_for(name: str) -> str | None:
    """The answer format that the words of a template ask for; None where they ask for neither, or for both."""
    text = template_file(name).read_text(encoding="utf-8", errors="replace")  # `PromptTemplate` refuses what is none
    box, line = r"\boxed" in text, _ANSWER_LINE.search(text) is not None
    return None if box == line else "boxed" if box else "answer_line"


class PromptTemplate:
    """A template by the name of a shipped one, or by the path of a user's `.jinja` file, for a tokenizer.

    `stop`: the strings it declares, and the end of a chat's turn where the model's files don't name it as an end token.
    `end`: the token that ends a demonstration. `text`: all that a prompt depends on besides the problem.
    Raises UserError if it cannot be found, read, parsed or rendered.
    """

    def __init__(self, name: str, tokenizer: TextTokenizer) -> None:
        path = template_file(name)
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True)
        try:
            self.text = path.read_text(encoding="utf-8")
            self._template: Template = environment.from_string(self.text)
            trial = self._template.make_module({"problem": _TRIAL})
        except Exception as error:  # a template is a program, which can fail in any way
            raise UserError(f"template {path}: {in_words(error)}") from None
        self._path = path
        declared = getattr(trial, "stop", [])
        if not isinstance(declared, list) or not all(isinstance(text, str) and text for text in declared):
            raise UserError(f"template {path}: stop must be a list of non-empty strings, not {declared!r}")
        self.stop: tuple[str, ...] = tuple(declared)
        self.end = tokenizer.eos_id
        self._chat: ChatTemplate | None = None
        self._set_chat(path, getattr(trial, "chat", False), getattr(trial, "system", None), tokenizer)
        if _TRIAL not in self.render(_TRIAL):
            raise UserError(f"template {path} does not use problem: write {{{{ problem }}}} where its text goes")

    @property
    def whole(self) -> bool:
        """Whether a rendering has all its special tokens, a BOS say: the tokenizer is to add none."""
        return self._chat is not None

    def render(self, problem: str) -> str:
        """The prompt text for a problem's text. Raises UserError where the template, or a chat template, refuses it."""
        try:
            text = self._template.render(problem=problem)
        except Exception as error:  # as above
            raise UserError(f"template {self._path}: {in_words(error)} (of the problem {problem!r:.80})") from None
        return text if self._chat is None else self._chat.render(self._messages(text), self._variables)

    def _set_chat(self, path: Path, chat: Any, system: Any, tokenizer: TextTokenizer) -> None:
        if not isinstance(chat, bool | dict):
            raise UserError(f"template {path}: chat must be true, false or a mapping, not {chat!r}")
        if system is not None and (chat is False or not isinstance(system, str)):
            raise UserError(f"template {path}: system must be a string, and needs {{% set chat = true %}}")
        if chat is False:
            return
        self._system, self._variables = system, {} if chat is True else dict(chat)
        self._chat = ChatTemplate(tokenizer)
        self.text += self._chat.text
        end = self._chat.end_of_answer(self._messages(_TRIAL), self._variables)
        if end is not None:
            self.end, spelled = end
            if self.end not in _end_tokens(tokenizer.folder):
                self.stop += (spelled,)

    def _messages(self, text: str) -> list[dict[str, str]]:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return [*system, {"role": "user", "content": text}]


def _end_tokens(model: Path) -> list[int]:
    """The ids at which every engine ends a response of this model by itself."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        if (model / name).is_file():
            ids = read_json(model / name).get("eos_token_id")
            found += ids if isinstance(ids, list) else [] if ids is None else [ids]
    return found
