"""Which samples are still to be drawn."""

import pytest
from test_scores import row

from rloop_mcore.errors import UserError
from rloop_mcore.evaluation.sampling import still_wanted
from rloop_mcore.types import Problem, Prompt

PROMPTS = [Prompt(Problem(name, "?", "!"), (1,)) for name in ("a", "b")]


def plan(samples: int, *kept: tuple[str, int]) -> list[tuple[str, int]]:
    rows = [row(name, sample, False) for name, sample in kept]
    return [(prompt.problem.id, sample) for prompt, sample in still_wanted(PROMPTS, samples, rows)]


def test_only_what_is_missing() -> None:
    assert plan(2) == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert plan(3, ("a", 0), ("a", 1), ("b", 1)) == [("a", 2), ("b", 0), ("b", 2)]
    assert plan(1, ("a", 0), ("a", 1), ("b", 0)) == []


def test_other_prompts_than_the_kept_ones_are_refused() -> None:
    changed = [Prompt(Problem("a", "?", "!"), (2,))]
    with pytest.raises(UserError, match="'a' was sampled before with another prompt"):
        still_wanted(changed, 2, [row("a", 1, True)])
