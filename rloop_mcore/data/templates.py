"""Prompt templates: small Jinja files that turn a problem's text into the prompt's.

A template sees one variable, `problem`, and may declare strings at which a response ends: `{% set stop = ["..."] %}`.
Other variables are refused. One newline at the end of the file is not part of the prompt.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rloop_mcore.errors import UserError

FOLDER = Path(__file__).parent / "templates"


def template_names() -> list[str]:
    """The names of the shipped templates."""
    return sorted(path.stem for path in FOLDER.glob("*.jinja"))


class PromptTemplate:
    """A template by the name of a shipped one, or by the path of a user's `.jinja` file.

    `stop`: the strings it declares. Raises UserError if it cannot be found, read, parsed or rendered.
    """

    def __init__(self, name: str) -> None:
        self.path = Path(name) if name.endswith(".jinja") else FOLDER / f"{name}.jinja"
        if not self.path.is_file():
            raise UserError(
                f"data.template {name!r} not found; it must be one of {', '.join(template_names())}, "
                "or the path of a .jinja file"
            )
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True)
        try:
            self._template: Template = environment.from_string(self.path.read_text(encoding="utf-8"))
            trial = self._template.make_module({"problem": "1 + 1 = ?"})
        except (OSError, ValueError, TypeError, TemplateError) as error:
            raise UserError(f"template {self.path}: {error}") from None
        if "1 + 1 = ?" not in str(trial):
            raise UserError(f"template {self.path} does not use problem: write {{{{ problem }}}} where its text goes")
        declared = getattr(trial, "stop", [])
        if not isinstance(declared, list) or not all(isinstance(text, str) and text for text in declared):
            raise UserError(f"template {self.path}: stop must be a list of non-empty strings, not {declared!r}")
        self.stop: tuple[str, ...] = tuple(declared)

    def render(self, problem: str) -> str:
        """The prompt text for a problem's text."""
        return self._template.render(problem=problem)
