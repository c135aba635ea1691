"""Learning, forgetting and coverage against loops over problems that read like the definitions."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rloop_mcore.analysis.answers import Answers, make_answers
from rloop_mcore.analysis.checkpoints import Checkpoints
from rloop_mcore.analysis.compare import comparable
from rloop_mcore.analysis.coverage import coverage, distinct_solutions
from rloop_mcore.analysis.forgetting import (
    block_averages,
    differential_matrix,
    forgetting_matrix,
    learning_matrix,
    solved_matrix,
)
from rloop_mcore.analysis.plots import matrix
from rloop_mcore.analysis.read_run import Evaluation, Run


def random_answers(generator: np.random.Generator, problems: int, samples: int) -> Answers:
    rows = [
        (f"p{problem}", generator.integers(0, 5, generator.integers(0, 6)).tolist(), bool(generator.random() < 0.3))
        for problem in range(problems)
        for _ in range(samples)
    ]
    generator.shuffle(rows)  # type: ignore[arg-type]
    return make_answers(rows)


def solves(answers: Answers, problem: str) -> bool:
    return any(
        answers.problems[code] == problem and right
        for code, right in zip(answers.problem, answers.correct, strict=True)
    )


@given(seed=st.integers(0, 10_000), checkpoints=st.integers(0, 6), problems=st.integers(1, 7))
@settings(max_examples=40)
def test_matrices_count_problems(seed: int, checkpoints: int, problems: int) -> None:
    generator = np.random.default_rng(seed)
    evaluations = [random_answers(generator, problems, 3) for _ in range(checkpoints)]
    names, solved = solved_matrix(evaluations)
    assert names == ([f"p{i}" for i in range(problems)] if checkpoints else [])
    learned, forgotten = learning_matrix(solved), forgetting_matrix(solved)
    for i, earlier in enumerate(evaluations):
        for j, later in enumerate(evaluations):
            if i >= j:
                assert np.isnan(learned[i, j])
                assert np.isnan(forgotten[i, j])
                continue
            new = sum(solves(later, name) and not solves(earlier, name) for name in names)
            lost = sum(solves(earlier, name) and not solves(later, name) for name in names)
            assert learned[i, j] == pytest.approx(new / problems)
            assert forgotten[i, j] == pytest.approx(lost / problems)


@given(seed=st.integers(0, 10_000), checkpoints=st.integers(1, 6))
@settings(max_examples=30)
def test_coverage_is_what_sets_say(seed: int, checkpoints: int) -> None:
    generator = np.random.default_rng(seed)
    evaluations = [random_answers(generator, 5, 2) for _ in range(checkpoints)]
    names, solved = solved_matrix(evaluations)
    found, ever = coverage(solved), set()
    for t, answers in enumerate(evaluations):
        now = {name for name in names if solves(answers, name)}
        ever |= now
        assert found.now[t] == pytest.approx(len(now) / 5)
        assert found.ever[t] == pytest.approx(len(ever) / 5)
        assert found.lost[t] == pytest.approx(len(ever - now) / 5)


def test_problems_that_one_checkpoint_was_not_asked_do_not_count() -> None:
    first = make_answers([("a", [1], True), ("b", [1], True), ("c", [1], False)])
    second = make_answers([("c", [1], True), ("b", [1], False)])
    names, solved = solved_matrix([first, second])
    assert names == ["b", "c"]
    assert solved.tolist() == [[True, False], [False, True]]


def test_blocks_of_the_differential_matrix() -> None:
    """Two iterations of two checkpoints: pairs (0,1) and (2,3) are within one, the other four between two."""
    vanilla = np.full((4, 4), np.nan)
    rloop = np.full((4, 4), np.nan)
    for i, j, v, r in [
        (0, 1, 0.2, 0.1),
        (2, 3, 0.4, 0.5),
        (0, 2, 0.5, 0.1),
        (0, 3, 0.6, 0.1),
        (1, 2, 0.7, 0.3),
        (1, 3, 0.3, 0.3),
    ]:
        vanilla[i, j], rloop[i, j] = v, r
    difference = differential_matrix(vanilla, rloop)
    assert difference[0, 2] == pytest.approx(0.4)
    intra, inter = block_averages(difference, [0, 0, 1, 1])
    assert intra == pytest.approx((0.1 - 0.1) / 2)
    assert inter == pytest.approx((0.4 + 0.5 + 0.4 + 0.0) / 4)
    assert np.isnan(block_averages(difference, [0, 0, 0, 0])[1])
    with pytest.raises(ValueError, match="4 and 3 checkpoints"):
        differential_matrix(vanilla, rloop[:3, :3])


def test_a_difference_of_nothing_has_the_middle_of_the_scale() -> None:
    nothing = np.array([[np.nan, 0.0], [np.nan, np.nan]])
    (drawn,) = matrix("title", "caption", nothing, ["a", "b"], [0, 1], 0.0, signed=True).spec["data"]
    assert drawn["zmin"] == -drawn["zmax"] < 0


def test_distinct_solutions_are_different_token_sequences() -> None:
    answers = make_answers(
        [("a", [1, 2], True), ("a", [1, 2], True), ("a", [2, 1], True), ("a", [3], False), ("b", [1], False)]
    )
    assert distinct_solutions(answers) == (2 + 0) / 2
    assert distinct_solutions(answers.only(["a"])) == 2
    assert np.isnan(distinct_solutions(answers.only([])))


def run_of(iterations: int, asked: str = "") -> Run:
    evaluation = Evaluation("base", 0, "base", 0, None, {}, problems={"b": asked} if asked else {})
    return Run("run", Path(), "", {"algorithm": {"iterations": iterations}}, [], [evaluation], [])


def checkpoints_of(iterations: list[int], solved: dict[int, str], problems: str = "abcd") -> Checkpoints:
    """`solved`: by RL steps, the problems that are."""
    rows = np.array([[name in names for name in problems] for names in solved.values()])
    places = [str(step) for step in solved]
    return Checkpoints(places, list(solved), iterations, list(problems), rows, [0.0] * len(solved), [])


def test_two_runs_are_compared_over_the_steps_and_problems_that_both_have() -> None:
    vanilla = checkpoints_of([0, 0, 0, 0], {0: "abc", 3: "", 4: "bc", 8: "b"}, "abc")
    rloop = checkpoints_of([0, 0, 1], {0: "bd", 4: "bcd", 8: ""}, "bcd")
    ((one, other, found),) = comparable([run_of(2), run_of(1)], [rloop, vanilla])
    assert (one, other, found.places, found.iterations) == (1, 0, [0, 1, 2], [0, 0, 1])
    pairs = [(0, 1), (0, 2), (1, 2)]
    # of b and c, which both were asked: vanilla forgets c between 4 and 8, RLoop both
    assert [found.vanilla[pair] for pair in pairs] == [0.0, 0.5, 0.5]
    assert [found.rloop[pair] for pair in pairs] == [0.0, 0.5, 1.0]


def test_what_cannot_be_compared_is_not() -> None:
    vanilla, rloop = checkpoints_of([0, 0], {0: "a", 4: "b"}), checkpoints_of([0, 0, 1], {0: "a", 4: "b", 8: "c"})
    first, second = run_of(1), run_of(2)
    assert list(comparable([first, second], [vanilla, rloop]))
    assert not list(comparable([run_of(1, "1 + 1?"), run_of(2, "1 + 2?")], [vanilla, rloop]))
    assert list(comparable([run_of(1, "1 + 1?"), run_of(2, "1 + 1?")], [vanilla, rloop]))
    for found in (
        [vanilla, checkpoints_of([0, 1], {0: "", 4: ""}, "xyz")],  # no problem is both's
        [vanilla, checkpoints_of([0, 1], {0: "a", 8: "b"})],  # but theta_0 they share no step
        [vanilla, checkpoints_of([0, 0], {0: "a", 4: "b"})],  # of several iterations, and in its first
        [checkpoints_of([0], {0: "a"}), rloop],
    ):
        assert not list(comparable([first, second], found))
    assert not list(comparable([second, second], [vanilla, rloop]))
    begun = checkpoints_of([0], {0: "a"})  # a vanilla run that forgets nothing yet: the next one is taken
    assert [pair[:2] for pair in comparable([first, first, second], [begun, vanilla, rloop])] == [(1, 2)]
