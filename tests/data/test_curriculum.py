"""Weighted draws, and curricula by success rates."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from rloop_mcore.data import challenging
from rloop_mcore.data.curriculum import SampledCurriculum, load_sampler
from rloop_mcore.data.prompts import TemplatePrompts
from rloop_mcore.data.templates import PromptTemplate
from rloop_mcore.errors import UserError
from rloop_mcore.types import Problem, Visit
from tests.data.chat_tokenizer import write_chat_tokenizer

PROBLEMS = [Problem(f"p{n}", f"{n}?", "1") for n in range(8)]
HERE = __name__


@pytest.fixture
def prompts(tmp_path: Path) -> TemplatePrompts:
    return make(tmp_path, PROBLEMS)


def make(folder: Path, problems: Sequence[Problem], seed: int = 0) -> TemplatePrompts:
    tokenizer = write_chat_tokenizer(folder)
    return TemplatePrompts(problems, tokenizer, PromptTemplate("countdown", tokenizer), seed, 99)


def ids(prompts: TemplatePrompts, position: int, count: int, weights: Sequence[float] | None) -> tuple[list[str], int]:
    drawn, after = prompts.draw(position, count, weights)
    return [prompt.problem.id for prompt in drawn], after


def test_equal_weights_draw_what_none_do(prompts: TemplatePrompts) -> None:
    assert ids(prompts, 3, 50, [1.0] * 8) == ids(prompts, 3, 50, None)


def test_problems_come_as_often_as_their_weights_say_and_once_an_epoch(prompts: TemplatePrompts) -> None:
    weights, epochs = [1.0, 0.5, 0.25, 0.1, 0.0, 1.0, 0.01, 0.75], 4000
    places, position = list[tuple[int, str]](), 0
    while position < 8 * epochs:
        (name,), position = ids(prompts, position, 1, weights)
        places.append(((position - 1) // 8, name))
    places = [(epoch, name) for epoch, name in places if epoch < epochs]
    assert len(set(places)) == len(places)
    counts = Counter(name for _, name in places)
    for problem, weight in zip(PROBLEMS, weights, strict=True):
        deviation = math.sqrt(epochs * weight * (1 - weight))
        assert abs(counts[problem.id] - epochs * weight) <= 4 * deviation, problem.id


def test_a_weighted_draw_depends_on_seed_position_and_weights_alone(tmp_path: Path, prompts: TemplatePrompts) -> None:
    weights = [1.0, 0.9, 0.1, 0.2, 0.3, 0.0, 1.0, 0.4]
    whole, end = ids(prompts, 5, 40, weights)
    pieces, position = list[str](), 5
    for count in (1, 0, 7, 12, 20):
        fresh = make(tmp_path, PROBLEMS)  # nothing drawn before
        batch, position = ids(fresh, position, count, weights)
        pieces += batch
    assert (pieces, position) == (whole, end)
    assert ids(make(tmp_path, PROBLEMS[::-1]), 5, 40, weights[::-1]) == (whole, end)  # nor on the order of the file
    other = make(tmp_path, PROBLEMS, seed=1)
    assert ids(other, 5, 40, weights)[0] != whole
    assert ids(other, 5, 40, [0.5] * 8)[1] != ids(prompts, 5, 40, [0.5] * 8)[1]  # where both pass over other places
    assert ids(prompts, 5, 40, weights[::-1])[0] != whole


seen: list[dict[str, list[Visit]]] = []


def record(problems: Sequence[Problem], visits: Mapping[str, Sequence[Visit]]) -> list[float]:
    seen.append({name: list(of_problem) for name, of_problem in visits.items()})
    return [4.0 if problem.id == "p1" else 1.0 for problem in problems]


def test_a_sampler_sees_what_went_before_the_step_it_is_asked_about() -> None:
    curriculum = SampledCurriculum(f"{HERE}:record", PROBLEMS[:2])
    first, second, third = Visit(0, 7, 4, 1), Visit(1, 0, 4, 2), Visit(1, 1, 8, 3)
    curriculum.begin([("p0", first), ("gone", first)])
    seen.clear()
    assert curriculum.weights(1, -1) == [0.25, 1.0]
    curriculum.observe([("p0", second), ("p1", second)])
    curriculum.weights(1, 0)
    curriculum.observe([("p1", third)])
    curriculum.weights(1, 1)
    curriculum.weights(1, 2)
    before = {"p0": [first], "p1": []}
    expected = [
        before,
        before,
        {"p0": [first, second], "p1": [second]},
        {"p0": [first, second], "p1": [second, third]},
    ]
    assert seen == expected
    curriculum.begin([("p1", first)])
    curriculum.weights(1, 0)
    assert seen[-1] == {"p0": [], "p1": [first]}


def some(problems: Sequence[Problem], visits: object) -> list[float]:
    return [0.0, 2.0]


def test_a_problem_may_be_left_out() -> None:
    assert SampledCurriculum(f"{HERE}:some", PROBLEMS[:2]).weights(0, 0) == [0.0, 1.0]


def short(problems: Sequence[Problem], visits: object) -> list[float]:
    return [1.0]


def negative(problems: Sequence[Problem], visits: object) -> list[float]:
    return [1.0, -0.5]


def nan(problems: Sequence[Problem], visits: object) -> list[float]:
    return [math.nan, 1.0]


def infinite(problems: Sequence[Problem], visits: object) -> list[float]:
    return [1.0, math.inf]


def zeros(problems: Sequence[Problem], visits: object) -> list[float]:
    return [0.0, 0.0]


def words(problems: Sequence[Problem], visits: object) -> list[str]:
    return ["often", "seldom"]


def broken(problems: Sequence[Problem], visits: Mapping[str, Sequence[Visit]]) -> list[float]:
    return [1 / len(visits[problem.id]) for problem in problems]


def nothing(problems: Sequence[Problem], visits: object) -> None:
    pass


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "gave 1 weights for 2 problems"),
        ("negative", r"gave problem p1 the weight -0\.5: it must be finite and not negative"),
        ("nan", "gave problem p0 the weight nan"),
        ("infinite", "gave problem p1 the weight inf"),
        ("zeros", "gave every problem the weight 0"),
        ("words", r"failed \(ValueError: could not convert string to float: 'often'\)"),
        ("broken", r"failed \(ZeroDivisionError"),
        ("nothing", r"failed \(TypeError"),
    ],
)
def test_what_is_no_weight_is_said(name: str, message: str) -> None:
    curriculum = SampledCurriculum(f"{HERE}:{name}", PROBLEMS[:2])
    with pytest.raises(UserError, match=rf"data\.sampler={HERE}:{name} before step 3 of iteration 1 {message}"):
        curriculum.weights(1, 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("challenge", r"no known sampler: use challenging or a dotted path package\.module:function"),
        ("no.such.module:f", r"cannot import 'no\.such\.module' \(ModuleNotFoundError"),
        (f"{HERE}:no_such", "no function 'no_such'"),
        (f"{HERE}:HERE", "no function 'HERE'"),
        ("", "no known sampler"),
    ],
)
def test_a_sampler_that_is_not_there(name: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"data\.sampler='{name}'.* {message}"):
        load_sampler(name)


@pytest.mark.parametrize(
    ("visits", "all_right"),
    [
        ([(16, 16)], 17 / 33),
        ([(16, 0)], None),
        ([(16, 3), (8, 8)], None),  # as many as the last time
        ([(4, 0), (8, 8), (8, 8), (8, 8), (8, 8)], 33 / 41),  # the oldest is too old
    ],
)
def test_challenging_weights_by_the_chance_of_a_group_that_is_all_right(
    visits: list[tuple[int, int]], all_right: float | None
) -> None:
    """Against the integral of p^G over the success rates p that explain what was seen."""
    recent = visits[-4:]
    right, wrong = sum(s for _, s in recent), sum(n - s for n, s in recent)
    grid = [(k + 0.5) / 100_000 for k in range(100_000)]
    likelihood = [p**right * (1 - p) ** wrong for p in grid]
    integral = sum(p ** recent[-1][0] * chance for p, chance in zip(grid, likelihood, strict=True)) / sum(likelihood)
    assert all_right is None or integral == pytest.approx(all_right, rel=1e-6)
    of_problem = {"p0": [Visit(0, n, *counts) for n, counts in enumerate(visits)], "p1": []}
    weights = load_sampler("challenging")(PROBLEMS[:2], of_problem)
    assert weights == [pytest.approx(1 - integral, rel=1e-6), 1.0]
    assert challenging.RECENT == 4
