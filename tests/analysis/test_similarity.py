"""Bigram Jaccard similarity against Python sets."""

import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_with_samples import add_samples

from rloop_mcore.analysis import similarity
from rloop_mcore.analysis.answers import Answers, make_answers, read_answers
from rloop_mcore.analysis.matrix_figures import diversity_figures
from rloop_mcore.analysis.read_run import read_run
from rloop_mcore.analysis.similarity import pairwise_jaccard, similarity_matrix, without_self_pairs

Responses = list[list[int]]


def bigrams(response: list[int]) -> set[tuple[int, int]]:
    return set(pairwise(response))


def jaccard(a: list[int], b: list[int]) -> float:
    union = bigrams(a) | bigrams(b)
    return len(bigrams(a) & bigrams(b)) / len(union) if union else 1.0


def brute_force(checkpoints: list[dict[str, Responses]]) -> np.ndarray:
    size = len(checkpoints)
    matrix = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            by_problem = []
            for problem in checkpoints[0]:
                pairs = [jaccard(a, b) for a in checkpoints[i][problem] for b in checkpoints[j][problem]]
                by_problem.append(sum(pairs) / len(pairs))
            matrix[i, j] = sum(by_problem) / len(by_problem)
    return matrix


def answers_of(checkpoint: dict[str, Responses]) -> Answers:
    return make_answers([(problem, response, False) for problem, all_ in checkpoint.items() for response in all_])


responses = st.lists(st.lists(st.integers(0, 3), max_size=8), min_size=1, max_size=4)


@given(checkpoints=st.lists(st.fixed_dictionaries({"a": responses, "b": responses}), min_size=1, max_size=4))
@settings(max_examples=60)
def test_all_pairs_as_the_definition_has_it(checkpoints: list[dict[str, Responses]]) -> None:
    found = similarity_matrix([answers_of(each) for each in checkpoints], ["a", "b"])
    assert found == pytest.approx(brute_force(checkpoints), abs=1e-6)


def test_a_problem_that_was_not_asked_has_no_rows() -> None:
    assert len(make_answers([("a", [1], True)]).rows_of("b")) == 0


def test_rare_and_frequent_bigrams(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as a real response, over a real vocabulary, in both ways of counting."""
    generator = np.random.default_rng(0)
    base = generator.integers(0, 150_000, 3000)
    drawn = [
        base[start : start + 400].tolist() + generator.integers(0, 150_000, 50).tolist() for start in range(0, 2000, 90)
    ]
    expected = np.array([[jaccard(a, b) for b in drawn] for a in drawn])
    arrays = [np.asarray(response, np.int32) for response in drawn]
    assert pairwise_jaccard(arrays) == pytest.approx(expected, abs=1e-6)
    monkeypatch.setattr(similarity, "_PAIRS", 50)
    for few in (0, 2, 100):  # all are multiplied, some, none
        monkeypatch.setattr(similarity, "_FEW", few)
        assert pairwise_jaccard(arrays) == pytest.approx(expected, abs=1e-6)


def test_identical_and_different_solutions() -> None:
    same, other = {"a": [[1, 2, 3]] * 3}, {"a": [[7, 8, 9]] * 3}
    found = similarity_matrix([answers_of(same), answers_of(other)], ["a"])
    assert found.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert np.isnan(similarity_matrix([answers_of(same)], [])).all()


@given(drawn=st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=2, max_size=5))
@settings(max_examples=30)
def test_the_diagonal_without_pairs_of_one_solution(drawn: Responses) -> None:
    diagonal = similarity_matrix([answers_of({"a": drawn})], ["a"])[0, 0]
    others = [jaccard(a, b) for i, a in enumerate(drawn) for j, b in enumerate(drawn) if i != j]
    assert without_self_pairs(diagonal, len(drawn)) == pytest.approx(sum(others) / len(others), abs=1e-6)


def test_the_figure_takes_the_number_of_samples_from_the_answers(rloop_run: Path) -> None:
    add_samples(rloop_run, 2, ["base", "i0_explore_000004"], seed=4)  # 4 samples a problem, which no config says
    run = read_run(rloop_run)
    (figure,) = [each for each in diversity_figures([run]) if each.title == "Similarity within a checkpoint"]
    answers = read_answers(run.samples_file(run.evaluations[0]))
    pairs = []
    for problem in answers.problems:
        drawn = [answers.response(row).tolist() for row in answers.rows_of(problem)]
        pairs += [jaccard(a, b) for i, a in enumerate(drawn) for j, b in enumerate(drawn) if i != j]
    assert figure.spec["data"][0]["y"][0] == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)


def test_one_long_id_costs_no_memory_for_the_others() -> None:
    rows = [("x" * 10_000 if number == 0 else "a", [1], False) for number in range(2_000)]
    tracemalloc.start()
    answers = make_answers(rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert answers.problems == ["a", "x" * 10_000]
    assert answers.problem.tolist() == [1, *[0] * 1_999]
    assert peak < 5e6  # a fixed width would take 80 MB


def test_verdicts_hold_no_tokens() -> None:
    """A report keeps those of every checkpoint: with the tokens it took gigabytes."""
    before = pa.total_allocated_bytes()
    answers = make_answers([(f"p{number}", list(range(1000)), True) for number in range(100)])
    kept = answers.without_tokens(), answers.only([])
    assert pa.total_allocated_bytes() - before > 400_000
    del answers
    assert pa.total_allocated_bytes() - before < 10_000
    assert [len(each.tokens) for each in kept] == [0, 0]
