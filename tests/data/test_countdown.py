import random
import re
from contextlib import suppress
from dataclasses import fields
from itertools import permutations, product

import pytest

from rloop_mcore.data.countdown import CountdownSplits, generate, solution_text, solve
from rloop_mcore.types import Problem

SIZES = {"train": 200, "validation": 100, "test": 100, "hard": 100, "demonstrations": 2000}


@pytest.fixture(scope="module")
def splits() -> CountdownSplits:
    return generate(0, **SIZES)


def task(problem: Problem) -> tuple[tuple[int, ...], int]:
    """(sorted numbers, target) as the problem's text states them."""
    numbers, target = problem.problem.split("=")
    return tuple(sorted(map(int, numbers.split(",")))), int(target)


def is_solution(problem: Problem, text: str) -> bool:
    """An independent checker: reads the text with a regular expression and lets Python do the arithmetic."""
    numbers, target = task(problem)
    left = list(numbers)
    for step in text.split(","):
        match = re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", step)
        if match is None:
            return False
        a, b, result = (int(match[n]) for n in (1, 3, 4))
        if eval(f"{a} {match[2]} {b}") != result or not 0 <= result <= 40:
            return False
        for used in (a, b):
            if used not in left:
                return False
            left.remove(used)
        left.append(result)
    return left == [target]


def reachable(numbers: tuple[int, ...]) -> set[int]:
    """Brute force of another make: every order, every operators, the five bracketings, evaluated by Python."""
    shapes = [
        "(({}{}{}){}{}){}{}",
        "({}{}({}{}{})){}{}",
        "({}{}{}){}({}{}{})",
        "{}{}(({}{}{}){}{})",
        "{}{}({}{}({}{}{}))",
    ]
    found = set()
    for order, signs, shape in product(set(permutations(numbers)), product("+-*", repeat=3), shapes):
        text = shape.format(order[0], signs[0], order[1], signs[1], order[2], signs[2], order[3])
        with suppress(ArithmeticError):  # an intermediate left the range
            found.add(eval(re.sub(r"(\d+)", r"Checked(\1)", text), {"Checked": Checked}).value)
    return found


class Checked:
    """An integer that must stay in 0..40."""

    def __init__(self, value: int) -> None:
        if not 0 <= value <= 40:
            raise ArithmeticError
        self.value = value

    def __add__(self, other: "Checked") -> "Checked":
        return Checked(self.value + other.value)

    def __sub__(self, other: "Checked") -> "Checked":
        return Checked(self.value - other.value)

    def __mul__(self, other: "Checked") -> "Checked":
        return Checked(self.value * other.value)


@pytest.mark.parametrize("numbers", [(1, 1, 1, 1), (2, 3, 5, 7), (1, 4, 8, 9), (6, 7, 8, 9), (3, 3, 3, 5)])
def test_the_solver_finds_the_targets_of_a_brute_force(numbers: tuple[int, ...]) -> None:
    assert set(solve(numbers)) == reachable(numbers)


def test_the_solver_lists_every_step_sequence_of_a_small_case() -> None:
    assert {target: [solution_text(one) for one in found] for target, found in solve((1, 2)).items()} == {
        1: ["2-1=1"],
        2: ["1*2=2"],
        3: ["1+2=3"],
    }
    assert [solution_text(one) for one in solve((1, 1, 9))[18]] == ["1+1=2,2*9=18"]
    assert [solution_text(one) for one in solve((1, 1, 9))[11]] == [
        "1+1=2,2+9=11",
        "1+9=10,1+10=11",
    ]


def test_every_listed_solution_verifies_and_none_is_listed_twice() -> None:
    for numbers in [(1, 1, 1, 1), (2, 3, 5, 7), (2, 2, 8, 9)]:
        for target, found in solve(numbers).items():
            problem = Problem("x", f"{','.join(map(str, numbers))}={target}", str(target))
            texts = [solution_text(solution) for solution in found]
            assert len(set(texts)) == len(texts)
            assert all(is_solution(problem, text) for text in texts)


def test_splits_have_their_sizes_and_are_disjoint(splits: CountdownSplits) -> None:
    tasks = {field.name: [task(problem) for problem in getattr(splits, field.name)] for field in fields(splits)}
    assert {name: len(found) for name, found in tasks.items()} == SIZES
    for name, found in tasks.items():
        assert name == "demonstrations" or len(set(found)) == len(found)
        others = {one for other, part in tasks.items() if other != name for one in part}
        assert not others & set(found)


def test_every_demonstration_verifies(splits: CountdownSplits) -> None:
    assert all(is_solution(problem, problem.meta["solution"]) for problem in splits.demonstrations)
    solutions: dict[str, set[str]] = {}
    for problem in splits.demonstrations:
        solutions.setdefault(problem.problem, set()).add(problem.meta["solution"])
    assert max(map(len, solutions.values())) > 1  # random solutions, not one fixed solution a problem


def test_the_checker_of_this_file_refuses_wrong_solutions() -> None:
    problem = Problem("x", "3,4,5,8=19", "19")
    assert is_solution(problem, "3*5=15,15+8=23,23-4=19")
    assert not is_solution(problem, "3*5=15,15+4=19")  # 8 unused
    assert not is_solution(problem, "3*5=15,15+8=23,23-3=20")  # 3 twice, 20
    assert not is_solution(problem, "3*5=16,16+8=24,24-4=20")


def test_meta_counts_the_distinct_solutions_and_hard_ones_have_few(splits: CountdownSplits) -> None:
    for problem in random.Random(0).sample([*splits.train, *splits.hard], 20):
        numbers, target = task(problem)
        assert problem.meta["solutions"] == len(solve(numbers)[target])
        assert problem.meta["numbers"] == list(numbers)
        assert problem.meta["target"] == target
        assert problem.answer == str(target)
    assert max(problem.meta["solutions"] for problem in splits.hard) <= 3
    assert max(problem.meta["solutions"] for problem in splits.test) > 3


def test_the_seed_alone_decides(splits: CountdownSplits) -> None:
    assert generate(0, **SIZES) == splits
    assert generate(1, **SIZES).train != splits.train


def test_a_larger_training_split_only_adds(splits: CountdownSplits) -> None:
    larger = generate(0, **(SIZES | {"train": 2000}))
    assert larger.train[:200] == splits.train
    assert (larger.validation, larger.test, larger.hard, larger.demonstrations) == (
        splits.validation,
        splits.test,
        splits.hard,
        splits.demonstrations,
    )


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="too few for these sizes"):
        generate(0, **(SIZES | {"train": 100_000}))
