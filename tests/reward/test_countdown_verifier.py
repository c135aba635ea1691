"""The countdown verifier against brute force: all chains of right steps over all orders of the numbers."""

import re
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rloop_mcore.reward.countdown import grade_countdown
from rloop_mcore.types import Problem


def problem(numbers: list[int], target: int) -> Problem:
    return Problem("c", "", "", meta={"numbers": numbers, "target": target})


@cache
def solutions(numbers: tuple[int, ...], target: int) -> frozenset[tuple[str, ...]]:
    """Every right answer, built forwards: choose an ordered pair, apply an operation, go on with what is left."""
    if len(numbers) == 1:
        return frozenset({()} if numbers[0] == target else set())
    found = set()
    for i, a in enumerate(numbers):
        for j, b in enumerate(numbers):
            if i == j:
                continue
            rest = tuple(n for k, n in enumerate(numbers) if k not in (i, j))
            for symbol, result in (("+", a + b), ("-", a - b), ("*", a * b)):
                if 0 <= result <= 40:
                    step = f"{a}{symbol}{b}={result}"
                    found |= {(step, *tail) for tail in solutions(tuple(sorted((*rest, result))), target)}
    return frozenset(found)


numbers_1_to_9 = st.lists(st.integers(1, 9), min_size=4, max_size=4)
number = st.integers(0, 41).map(str)
step = st.tuples(number, st.sampled_from("+-*"), number, st.just("="), number).map("".join)


@settings(max_examples=60)
@given(numbers_1_to_9, st.integers(0, 40), st.booleans(), st.data())
def test_every_solution_is_right_and_a_changed_one_only_if_it_is_a_solution_too(
    numbers: list[int], target: int, spaced: bool, data: st.DataObject
) -> None:
    right = solutions(tuple(sorted(numbers)), target)
    for answer in sorted(right)[:20]:
        text = re.sub(r"([-+*=,])", r" \1 ", ",".join(answer)) if spaced else ",".join(answer)
        assert grade_countdown(problem(numbers, target), text, False, "boxed").correct
    if right:
        answer = list(data.draw(st.sampled_from(sorted(right))))
        answer[data.draw(st.integers(0, 2))] = data.draw(step)
        verdict = grade_countdown(problem(numbers, target), " , ".join(answer), False, "boxed")
        assert verdict.correct == (tuple(answer) in right)


@settings(max_examples=200)
@given(numbers_1_to_9, st.integers(0, 40), st.lists(step, min_size=1, max_size=4))
def test_random_steps(numbers: list[int], target: int, steps: list[str]) -> None:
    right = tuple(steps) in solutions(tuple(sorted(numbers)), target)
    assert grade_countdown(problem(numbers, target), ",".join(steps), False, "boxed").correct == right


@pytest.mark.parametrize(
    ("response", "truncated", "reason"),
    [
        ("3 * 5 = 15 , 15 + 8 = 23 , 23 - 2 = 21", False, "correct"),
        ("3*5=15,15+8=23,23-2=21", True, "correct"),
        ("", False, "no_answer"),
        ("   ", False, "no_answer"),
        ("", True, "truncated"),
        ("3 * 5 = 15 , 15 + 8 = 23 ,", False, "unparsable"),
        ("3 * 5 = 15 , 15 + 8 = 23 ,", True, "truncated"),
        ("3 * 5 = 15 , 15 + 8 = 23", False, "wrong"),
        ("3 * 5 = 15 , 15 + 8 = 23", True, "truncated"),
        ("3 * 5 = 16 , 16 + 8 = 24 , 24 - 2 = 22", True, "wrong"),
        ("3 * 5 = 15 , 15 + 8 = 23 , 23 - 1 = 22", False, "wrong"),
        ("3 * 5 = 15 , 15 + 8 = 23 , 23 - 2 = 21 , 21 + 0 = 21", False, "wrong"),
        ("3 / 5 = 0", False, "unparsable"),
        ("3 * 5 = 15 15 + 8 = 23", False, "unparsable"),
        ("3 * 5 = " + "9" * 10_000, False, "unparsable"),
        ("2 - 3 = -1 , -1 + 8 = 7 , 7 * 5 = 35", False, "wrong"),
        ("5 * 8 = 40 , 40 + 2 = 42 , 42 * 3 = 126", False, "wrong"),
        ("the target is 21", False, "unparsable"),
    ],
)
def test_reasons(response: str, truncated: bool, reason: str) -> None:
    verdict = grade_countdown(problem([3, 5, 8, 2], 21), response, truncated, "boxed")
    assert (verdict.correct, verdict.reason) == (reason == "correct", reason)
