"""The numbers of an evaluation against those worked out by hand."""

from array import array

import pytest

from rloop_mcore.evaluation.sampling import Graded
from rloop_mcore.evaluation.scores import breakdown, counts_of, majorities, scores_of, summary
from rloop_mcore.types import Problem


def row(problem: str, sample: int, correct: bool, length: int = 3, cut: bool = False) -> Graded:
    reason = "correct" if correct else "truncated" if cut else "wrong"
    return Graded(problem, sample, (1,), array("i", range(length)), correct, reason, "length" if cut else "stop")


ROWS = [
    *(row("a", 0, True), row("a", 1, False), row("a", 2, True), row("a", 3, False, 9, cut=True)),
    *(row("b", 0, False), row("b", 1, False), row("b", 2, False), row("b", 3, False)),
]
VOTES = ["7", "8", "7", "", "1", "2", "1", "1"]


def test_counts_and_summary() -> None:
    assert counts_of(ROWS) == {"a": [2, 4], "b": [0, 4]}
    found = summary(ROWS)
    assert found["response_length"] == pytest.approx((7 * 3 + 9) / 8)
    assert found["truncated"] == pytest.approx(1 / 8)
    assert found["reasons"] == {"correct": 2, "truncated": 1, "wrong": 5}


def test_majorities_are_of_the_votes() -> None:
    assert majorities(ROWS, VOTES, [1, 2, 4]) == {
        # of a's 6 pairs: 7-7 and twice 7-nothing are won, twice 7-8 is a tie, 8-nothing is lost
        "maj@2": [pytest.approx((3 + 2 * 0.5) / 6), 0.0],
        "maj@4": [pytest.approx(1.0), 0.0],
    }


def test_several_right_answers_add_up() -> None:
    """A problem with many solutions: what wins may be any of them."""
    rows = [row("a", sample, sample < 2) for sample in range(4)]
    assert majorities(rows, ["x", "y", "z", "z"], [4])["maj@4"] == [0.0]
    assert majorities(rows, ["x", "y", "z", "w"], [4])["maj@4"] == [pytest.approx(0.5)]


def test_groups_are_by_source_level_and_subject() -> None:
    problems = [
        Problem(
            "a",
            "?",
            "7",
            "aime24",
            meta={"level": 10.0, "subject": ["Mathematics -> Algebra -> Sums", "Mathematics -> Sets"]},
        ),
        Problem("b", "?", "9", "math-ai/amc", meta={"level": 2, "subject": "Mathematics -> Algebra -> Products"}),
    ]
    groups = breakdown(problems, ROWS, scores_of(ROWS, 4, [2]), seed=0)
    assert list(groups["source"]) == ["aime24", "math-ai/amc"]
    assert groups["source"]["aime24"] == groups["level"]["10"]
    assert list(groups["level"]) == ["2", "10"]
    assert list(groups["subject"]) == ["Algebra", "Sets"]
    assert groups["subject"]["Algebra"]["problems"] == 2
    assert groups["subject"]["Algebra"]["metrics"]["avg@4"]["mean"] == pytest.approx(0.25)
    assert groups["subject"]["Sets"]["metrics"]["pass@2"]["mean"] == pytest.approx(1 - 1 / 6)
    assert groups["level"]["10"]["response_length"] == pytest.approx((3 * 3 + 9) / 4)
    assert groups["level"]["10"]["truncated"] == pytest.approx(1 / 4)


@pytest.mark.parametrize(("count", "groups"), [(20, 20), (21, 0)])
def test_sources_of_single_problems_are_no_groups(count: int, groups: int) -> None:
    problems = [Problem(str(number), "?", "7", f"https://example.org/{number}") for number in range(count)]
    rows = [row(problem.id, 0, True) for problem in problems]
    assert len(breakdown(problems, rows, scores_of(rows, 1, []), seed=0).get("source", {})) == groups


def test_one_group_is_none() -> None:
    problems = [Problem("a", "?", "7", meta={"level": 1}), Problem("b", "?", "9", meta={"level": 1, "subject": ""})]
    assert breakdown(problems, ROWS, scores_of(ROWS, 4, []), seed=0) == {}
