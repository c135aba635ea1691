"""Which answers the math verifier takes for equal, and that its short cuts take no other."""

import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rloop_mcore.reward.extract import extract_answer
from rloop_mcore.reward.math import compare, compare_symbolically, grade_math
from rloop_mcore.types import Problem, Verdict
from tests.reward.pairs import PAIRS

OUTPUTS = Path(__file__).parents[3] / "shared" / "data" / "grading_outputs.jsonl"


def test_the_set_is_large_and_covers_what_it_should() -> None:
    labels = [equal for pairs in PAIRS.values() for _, _, equal in pairs]
    assert len(labels) >= 150
    assert min(labels.count(True), labels.count(False)) >= 0.4 * len(labels)
    assert all(any(equal for *_, equal in pairs) and any(not equal for *_, equal in pairs) for pairs in PAIRS.values())
    assert len({pair[:2] for pairs in PAIRS.values() for pair in pairs}) == len(labels)


@pytest.mark.parametrize("kind", PAIRS)
def test_hand_labelled_pairs(kind: str) -> None:
    """Every wrong verdict of a kind at once: one says less about a change than all."""
    verdicts = {(gold, answer): (equal, compare(gold, answer)) for gold, answer, equal in PAIRS[kind]}
    assert {pair: verdict.reason for pair, (equal, verdict) in verdicts.items() if verdict.correct != equal} == {}


@pytest.mark.parametrize("kind", PAIRS)
def test_short_cuts_change_no_verdict_of_the_pairs(kind: str) -> None:
    """Both ways round. Equal texts are equal whether or not there is a parser that reads them."""
    for one, other, _ in PAIRS[kind]:
        for gold, answer in ((one, other), (other, one)):
            slow = compare_symbolically(gold, answer)
            assert compare(gold, answer).correct == slow.correct, (gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        (r"\mathbb{Z}_8", r"\mathbb{Z}_{8}", True),
        (r"\mathbb{Z}_8", r"\mathbb{Z}_{6}", False),
        (r"\aleph_0", r"\aleph_{0}", True),
        (r"\aleph_0", r"\aleph_{1}", False),
        ("E_{1},E_{2}", "E_1, E_2", True),
        ("E_{1},E_{2}", "E_2, E_3", False),
    ],
)
def test_what_no_parser_reads_is_its_spelling(gold: str, answer: str, equal: bool) -> None:
    assert compare(gold, answer).correct == equal
    assert not compare_symbolically(gold, answer).correct


@pytest.mark.skipif(not OUTPUTS.exists(), reason="needs ../shared/data/grading_outputs.jsonl")
def test_short_cuts_change_no_verdict_of_real_answers() -> None:
    rows = [json.loads(line) for line in OUTPUTS.read_text(encoding="utf-8").splitlines()]
    answers = {extract_answer(row["pred"], False, "boxed")[0] for row in rows} - {""}
    golds = {row["gold"] for row in rows}
    assert len(answers) > 50
    for row in rows:
        answer, reason = extract_answer(row["pred"], False, "boxed")
        if not reason:
            assert compare(row["gold"], answer).correct == compare_symbolically(row["gold"], answer).correct
    for gold in sorted(golds):  # and every answer against golds of other problems
        for answer in sorted(answers)[:: max(1, len(answers) // 8)]:
            assert compare(gold, answer).correct == compare_symbolically(gold, answer).correct, (gold, answer)


decimals = st.decimals(min_value=-1000, max_value=1000, places=3).map(str)
tiny = st.integers(1, 99).map(lambda digits: f"0.{digits:08}")
fractions = st.fractions(min_value=-20, max_value=20, max_denominator=50).map(
    lambda value: rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
)
numbers = st.one_of(st.integers(-(10**12), 10**12).map(str), decimals, tiny, fractions, st.integers(-9, 9).map(str))


@settings(max_examples=150, deadline=None)
@given(numbers, numbers)
def test_short_cuts_change_no_verdict_of_numbers(gold: str, answer: str) -> None:
    assert compare(gold, answer) == compare_symbolically(gold, answer)
    assert compare_symbolically(gold, gold).correct


@settings(max_examples=100, deadline=None)
@given(st.integers(-500, 500), st.integers(1, 60), st.integers(-500, 500), st.integers(1, 60))
def test_fractions_are_equal_as_their_values_are(a: int, b: int, c: int, d: int) -> None:
    verdict = compare(rf"\frac{{{a}}}{{{b}}}", f"{c}/{d}")
    assert verdict.correct == (Fraction(a, b) == Fraction(c, d))


@pytest.mark.parametrize(
    ("response", "truncated", "answer_format", "reason"),
    [
        (r"so \boxed{72}", False, "boxed", "correct"),
        (r"so \boxed{72}, that is", True, "boxed", "correct"),
        (r"so \boxed{73}", False, "boxed", "wrong"),
        (r"\boxed{71} or rather \boxed{72}", False, "boxed", "correct"),
        (r"\boxed{72} or rather \boxed{71}", False, "boxed", "wrong"),
        (r"\boxed{72} \boxed{71}", False, "boxed", "wrong"),
        (r"\boxed{71}. The final answer is $72$. I hope it is correct.", False, "boxed", "wrong"),
        (r"\boxed{72}. The final answer is $71$. I hope it is correct.", False, "boxed", "correct"),
        ("the answer is 72", False, "boxed", "no_answer"),
        ("the answer is 72, because", True, "boxed", "truncated"),
        (r"72 \boxed{7", True, "boxed", "truncated"),
        (r"72 = \boxed{}", False, "boxed", "no_answer"),
        (r"\boxed{\frac{}{}}", False, "boxed", "unparsable"),
        ("Answer: 72", False, "answer_line", "correct"),
        ("Answer: $1,072.00", False, "answer_line", "wrong"),
        ("The answer is 72", False, "answer_line", "no_answer"),
        (r"\boxed{72}", False, "answer_line", "no_answer"),
        ("Answer: 7", True, "answer_line", "truncated"),
        ("Answer: 72\nand so", True, "answer_line", "correct"),
    ],
)
def test_verdict_on_a_whole_response(response: str, truncated: bool, answer_format: str, reason: str) -> None:
    verdict = grade_math(Problem("p", "", "72"), response, truncated, answer_format)
    assert verdict == Verdict(reason == "correct", reason)
