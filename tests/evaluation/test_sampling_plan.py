"""Which samples are still to be drawn, and what is kept of those that are."""

from array import array
from collections.abc import Iterable, Sequence

import pytest
from test_scores import row

from rloop_mcore.errors import UserError
from rloop_mcore.evaluation.sampling import Graded, Sampler, still_wanted, votes_of
from rloop_mcore.protocols import Answered
from rloop_mcore.types import Completion, Problem, Prompt, SampleRequest, Sampling, Times, Trajectory, Verdict

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


def test_a_drawn_sample_has_what_engine_and_verifier_said() -> None:
    completions = [
        Completion((5, 6), (-0.5, -0.25), "length", ((3, 2),), engine=2, started=7.0, seconds=11.0),
        Completion((8,), (-0.75,), "stop", ((4, 1),), engine=1, started=9.0, seconds=13.0),
    ]

    class Engine:
        def generate(self, requests: Sequence[SampleRequest], sampling: Sampling, answered: Answered) -> object:
            answered([0, 1], completions)
            return completions

    class Rewards:
        def grade(self, items: Iterable[tuple[Problem, str, bool]]) -> list[Verdict]:
            return [Verdict(not cut, text, 17.0 if cut else 19.0) for _, text, cut in items]

    sampler = Sampler(Engine(), Rewards(), lambda ids: f"{ids}", Sampling(2), 0, 2)  # type: ignore[arg-type]
    begun = Trajectory(0, 0, "a", 4, (1,), (5, 6), (-0.5, -0.25), "length", ((3, 2),), False, 0.0, "(5, 6)", engine=2)
    ended = Trajectory(0, 0, "b", 1, (1,), (8,), (-0.75,), "stop", ((4, 1),), True, 1.0, "(8,)", engine=1)
    drawn = sampler.draw([(PROMPTS[0], 4), (PROMPTS[1], 1)])
    assert drawn == [begun, ended]
    assert [row.times for row in drawn] == [Times(7.0, 11.0, 17.0), Times(9.0, 13.0, 19.0)]


def test_equal_responses_vote_once_unless_one_was_cut() -> None:
    asked: list[tuple[str, str, bool]] = []

    class Rewards:
        def votes(self, items: Sequence[tuple[Problem, str, bool]]) -> list[str]:
            asked.extend((problem.id, text, cut) for problem, text, cut in items)
            return [f"{problem.id}{text}{cut}" for problem, text, cut in items]

    rows = [
        Graded(name, sample, (1,), array("i", ids), False, "", end)
        for sample, (name, ids, end) in enumerate(
            [("a", [1], "stop"), ("b", [1], "stop"), ("a", [1], "stop"), ("a", [1], "length"), ("b", [2], "stop")]
        )
    ]
    votes = votes_of(rows, PROMPTS, Rewards(), lambda ids: str(ids[0]))  # type: ignore[arg-type]
    assert votes == ["a1False", "b1False", "a1False", "a1True", "b2False"]
    assert len(asked) == 4
