"""Problems as prompts: rendered, tokenised, and drawn in an endless seeded order."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache

from rloop_mcore.data.templates import PromptTemplate
from rloop_mcore.data.tokenizer import TextTokenizer
from rloop_mcore.errors import UserError
from rloop_mcore.types import Example, Problem, Prompt

log = logging.getLogger(__name__)


class TemplatePrompts:
    """Implements `protocols.Prompts` over a problem set.

    `prompts` holds those within `max_prompt_tokens`, in the order of `problems`; `too_long` counts the others.
    Raises UserError if none is left.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        tokenizer: TextTokenizer,
        template: PromptTemplate,
        seed: int,
        max_prompt_tokens: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self._seed = seed
        rendered = [prompt_of(problem, tokenizer, template) for problem in problems]
        self.prompts = [prompt for prompt in rendered if len(prompt.ids) <= max_prompt_tokens]
        self.too_long = len(rendered) - len(self.prompts)
        if not self.prompts:
            shortest = min(len(prompt.ids) for prompt in rendered)
            raise UserError(
                f"all {len(rendered)} prompts are longer than data.max_prompt_tokens={max_prompt_tokens}; "
                f"the shortest has {shortest} tokens"
            )
        if self.too_long:
            log.warning(
                "%d of %d prompts are longer than data.max_prompt_tokens=%d and are left out",
                self.too_long,
                len(rendered),
                max_prompt_tokens,
            )
        self._epoch_order = lru_cache(maxsize=2)(self._permutation)

    def example(self, problem: Problem) -> Example:
        """The demonstration in `problem.meta["solution"]`, ended as the template says; raises UserError without one."""
        response = (*self.tokenizer.encode(solution_of(problem), special_tokens=False), self.template.end)
        prompt = prompt_of(problem, self.tokenizer, self.template)
        return Example(prompt_ids=prompt.ids, response_ids=response)

    def draw(self, position: int, count: int, weights: Sequence[float] | None = None) -> tuple[list[Prompt], int]:
        """The next `count` prompts from place `position` of the endless order on, and the place after them.

        weights [prompts]: see `protocols.Prompts`. Depends on nothing drawn before.
        """
        drawn: list[Prompt] = []
        while len(drawn) < count:
            epoch, index = divmod(position, len(self.prompts))
            number = self._epoch_order(epoch)[index]
            if weights is None or self._chance(position) < weights[number]:
                drawn.append(self.prompts[number])
            position += 1
        return drawn, position

    def decode(self, ids: Sequence[int]) -> str:
        """The text of response ids, special tokens dropped."""
        return self.tokenizer.decode(ids)

    def _chance(self, position: int) -> float:
        """A number from [0, 1) for a place of the order; like the order itself, by a hash."""
        digest = hashlib.sha256(f"{self._seed}/chance/{position}".encode()).digest()
        return (int.from_bytes(digest[:8], "big") >> 11) / 2**53

    def _permutation(self, epoch: int) -> list[int]:
        """The order of an epoch: indices into `prompts` sorted by a hash of (seed, epoch, problem id).

        A hash and no random generator: it stays the same across library versions and when the file is reordered.
        """

        def key(index: int) -> bytes:
            text = f"{self._seed}/{epoch}/{self.prompts[index].problem.id}"
            return hashlib.sha256(text.encode()).digest()

        return sorted(range(len(self.prompts)), key=key)


def prompt_of(problem: Problem, tokenizer: TextTokenizer, template: PromptTemplate) -> Prompt:
    """A problem rendered and tokenised, whatever its length. Raises UserError if no token comes of it."""
    ids = tokenizer.encode(template.render(problem.problem), special_tokens=not template.whole)
    if not ids:
        raise UserError(f"the tokenizer makes no token of problem {problem.id}: {problem.problem!r:.200}")
    return Prompt(problem=problem, ids=ids)


def solution_of(problem: Problem) -> str:
    """The demonstration that comes with a problem. Raises UserError where none does."""
    solution = problem.meta.get("solution")
    if not isinstance(solution, str) or not solution.strip():
        raise UserError(f"sft.demonstrations: problem {problem.id} has no text in meta.solution to learn from")
    return solution


def check_lengths(
    problems: Sequence[Problem], tokenizer: TextTokenizer, template: PromptTemplate, max_prompt_tokens: int
) -> None:
    """Raises UserError where all prompts are too long; looks no further than the first that is not."""
    for problem in problems:
        with suppress(UserError):
            if len(prompt_of(problem, tokenizer, template).ids) <= max_prompt_tokens:
                return
    TemplatePrompts(problems, tokenizer, template, 0, max_prompt_tokens)


def check_vocabulary(problem: Problem, tokenizer: TextTokenizer, template: PromptTemplate, vocabulary: int) -> None:
    """Raises UserError where a prompt, or what ends a demonstration, has a token beyond the model's `vocabulary`."""
    prompt = prompt_of(problem, tokenizer, template)
    if (largest := max(*prompt.ids, template.end)) >= vocabulary:
        raise UserError(
            f"{tokenizer.folder}: its tokenizer has token {largest} in a prompt or at its end, and the model's "
            f"vocab_size is {vocabulary}: take the tokenizer that the model came with, or resize its embeddings"
        )
