"""Countdown, a generated task: use each of four numbers once, with + - *, to make a target.

A problem reads `3,4,5,8=19`, its solution `3*5=15,15+8=23,23-4=19`: every number is one token, so
that a tiny model has to learn the search and not the spelling of numbers. Most problems have many solutions, so
pass@k and diversity mean something.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from itertools import combinations, combinations_with_replacement

from rloop_mcore.types import Problem

NUMBERS_A_PROBLEM = 4
LARGEST_NUMBER = 9  # numbers of a problem: 1..9
LARGEST_RESULT = 40  # targets and intermediate results: 0..40
FEW_SOLUTIONS = 3  # a problem with at most as many distinct solutions belongs to the harder split
RESERVED_FOR_TRAINING = 2000  # kept out of the demonstrations whatever the training split's size

PAD, EOS = "<pad>", "<eos>"
VOCABULARY = [PAD, EOS, "+", "-", "*", "=", ",", *map(str, range(LARGEST_RESULT + 1))]  # 48 tokens

Step = tuple[int, str, int, int]  # a, operator, b, result
Solution = tuple[Step, ...]
Task = tuple[tuple[int, ...], int]  # sorted numbers, target


def solve(numbers: tuple[int, ...]) -> dict[int, list[Solution]]:
    """All distinct solutions of every target that the numbers can make, sorted.

    Distinct means: another sequence of steps. `a + b` and `b + a` are one step (the smaller number stands first).
    """
    found: dict[int, set[Solution]] = {}

    def search(left: tuple[int, ...], steps: Solution) -> None:
        if len(left) == 1:
            found.setdefault(left[0], set()).add(steps)
            return
        for i, j in combinations(range(len(left)), 2):
            rest = left[:i] + left[i + 1 : j] + left[j + 1 :]
            for step in _steps(*sorted((left[i], left[j]))):
                search((*rest, step[3]), (*steps, step))

    search(numbers, ())
    return {target: sorted(found[target]) for target in sorted(found)}


def _steps(low: int, high: int) -> Iterator[Step]:
    candidates = [(low, "+", high, low + high), (high, "-", low, high - low), (low, "*", high, low * high)]
    return (step for step in candidates if step[3] <= LARGEST_RESULT)


def solution_text(solution: Solution) -> str:
    """A solution as the response spells it."""
    return ",".join(f"{a}{operator}{b}={result}" for a, operator, b, result in solution)


@dataclass(frozen=True)
class CountdownSplits:
    """No two splits share a (sorted numbers, target); demonstrations share none with any split."""

    train: list[Problem]
    validation: list[Problem]
    test: list[Problem]
    hard: list[Problem]  # few distinct solutions
    demonstrations: list[Problem]  # with a random solution in meta.solution; a problem may appear again with another


def generate(
    seed: int,
    train: int,
    validation: int,
    test: int,
    hard: int,
    demonstrations: int,
    numbers_a_problem: int = NUMBERS_A_PROBLEM,
    reserved: int = RESERVED_FOR_TRAINING,
) -> CountdownSplits:
    """Draw all splits, of the given sizes, as a pure function of the arguments.

    A smaller `train` is a prefix of a larger one and changes no other split, up to `reserved` problems.
    Raises ValueError if the task has too few problems for these sizes.
    """
    given = combinations_with_replacement(range(1, LARGEST_NUMBER + 1), numbers_a_problem)
    solutions = {(numbers, target): found for numbers in given for target, found in solve(numbers).items()}
    draw = random.Random(f"countdown/{seed}")
    tasks = sorted(solutions)
    draw.shuffle(tasks)

    few = [task for task in tasks if len(solutions[task]) <= FEW_SOLUTIONS]
    hard_tasks = few[:hard]
    taken = set(hard_tasks)
    pool = [task for task in tasks if task not in taken]
    validation_end, test_end = validation, validation + test
    reserved_end = test_end + max(train, reserved)
    others = pool[reserved_end:]
    if len(hard_tasks) < hard or not others:
        raise ValueError(f"countdown has {len(tasks)} problems, {len(few)} of them hard: too few for these sizes")

    def problems(name: str, part: list[Task]) -> list[Problem]:
        return [_problem(f"countdown_{name}/{n}", task, len(solutions[task])) for n, task in enumerate(part)]

    def demonstration(number: int) -> Problem:
        task = draw.choice(others)
        solution = solution_text(draw.choice(solutions[task]))
        return _problem(f"countdown_demonstrations/{number}", task, len(solutions[task]), solution)

    return CountdownSplits(
        train=problems("train", pool[test_end : test_end + train]),
        validation=problems("validation", pool[:validation_end]),
        test=problems("test", pool[validation_end:test_end]),
        hard=problems("hard", hard_tasks),
        demonstrations=[demonstration(number) for number in range(demonstrations)],
    )


@cache
def standard_splits(task: str) -> dict[str, list[Problem]]:
    """The splits of `countdown`, or of its little sister `countdown3` with three numbers: fixed draws.

    What a source `TASK:SPLIT` names.
    """
    if task == "countdown":
        splits = generate(seed=0, train=2000, validation=200, test=200, hard=200, demonstrations=25_600)
    else:
        splits = generate(0, 100, 50, 50, 20, 12_800, numbers_a_problem=3, reserved=100)
    return {field.name: getattr(splits, field.name) for field in fields(splits)}


def _problem(name: str, task: Task, solutions: int, solution: str | None = None) -> Problem:
    numbers, target = task
    meta: dict[str, object] = {"numbers": list(numbers), "target": target, "solutions": solutions}
    if solution is not None:
        meta["solution"] = solution
    text = f"{','.join(map(str, numbers))}={target}"
    return Problem(id=name, problem=text, answer=str(target), source="countdown", meta=meta)
