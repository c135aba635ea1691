"""What answers vote for: the verifier's equal answers are one vote, unequal ones are not."""

import json
from itertools import product
from pathlib import Path

import pytest

from rloop_mcore.config import RewardConfig
from rloop_mcore.reward.extract import last_box
from rloop_mcore.reward.math import compare
from rloop_mcore.reward.pool import RewardPool
from rloop_mcore.reward.votes import normal_form, vote_math
from rloop_mcore.types import Problem

OUTPUTS = Path(__file__).parents[3] / "shared" / "data" / "grading_outputs.jsonl"
ONE_VOTE_EACH = [
    ["1/2", "0.5", r"\frac12", r"$\frac{1}{2}$", "0.50"],
    ["5", "5.0", "$5$."],
    ["1000", "1,000", "1 000", r"10^3"],
    ["1/3", "0.333333"],
    [r"\sqrt{2}", "1.414214"],
    ["x^2+x", "x+x^2"],
    [r"\text{East}", "east"],
    [r"(3,\frac{\pi}{2})", r"\left(3, \frac{\pi}{2}\right)"],
    ["0", "0.0"],
    ["3+2i", "2i+3"],
]


@pytest.mark.parametrize("spellings", ONE_VOTE_EACH, ids=lambda spellings: spellings[0])
def test_spellings_of_one_answer_are_one_vote(spellings: list[str]) -> None:
    assert len({normal_form(answer) for answer in spellings}) == 1


def test_different_answers_are_different_votes() -> None:
    forms = [normal_form(spellings[0]) for spellings in ONE_VOTE_EACH]
    assert len(set(forms)) == len(forms)


def test_one_vote_means_one_verdict() -> None:
    answers = [answer for spellings in ONE_VOTE_EACH for answer in spellings]
    for first, second in product(answers, answers):
        if normal_form(first) == normal_form(second):
            assert compare(first, second).correct, (first, second)


def test_numbers_at_the_ends() -> None:
    assert normal_form("-0.0000001") == "0"
    assert normal_form("10^{20}") == normal_form("100000000000000000000")
    assert normal_form("10^{10^{10}}") == "10**(10**10)"  # to print its digits would take for ever


def test_votes_come_from_the_pool() -> None:
    problem = Problem("p", "?", r"\frac{1}{2}")
    responses = [r"\boxed{0.5}", r"\boxed{1/2}", r"\boxed{7}", "no answer", r"\boxed{x + 1}", r"\boxed{1 + x}"]
    with RewardPool(RewardConfig(workers=1)) as pool:
        votes = pool.votes([(problem, response, False) for response in responses])
        verdicts = pool.grade([(problem, response, False) for response in responses])
    assert votes[0] == votes[1] == normal_form(problem.answer)
    assert votes[2:4] == ["7", ""]
    assert votes[4] == votes[5] != ""
    assert [verdict.correct for verdict in verdicts] == [True, True, False, False, False, False]


def test_a_solution_of_countdown_is_its_own_vote() -> None:
    with RewardPool(RewardConfig(verifier="countdown", workers=1)) as pool:
        items = [(Problem("p", "?", "!"), "1 + 2 = 3", False), (Problem("p", "?", "!"), "1+2=3", False)]
        assert pool.votes([*items, (Problem("p", "?", "!"), "1+2", True)]) == ["1+2=3", "1+2=3", ""]


def test_a_verifier_of_the_users_has_no_votes() -> None:
    with RewardPool(RewardConfig(verifier="bad_verifiers:misbehave", workers=1)) as pool:
        assert pool.votes([(Problem("p", "?", "right"), "right", False)]) == [""]


def test_a_wrong_answer_that_is_an_equation_votes_for_its_value() -> None:
    def vote(gold: str, answer: str) -> str:
        return vote_math(Problem("p", "Find $m^2$.", gold), rf"\boxed{{{answer}}}", False, "boxed")

    assert vote("8", "x = 7") == vote("8", "m + n = 7") == vote("8", "x = 5 + 2 = 7.0") == vote("8", "7") == "7"
    assert vote("8", "m^2 = 7") == "7" != vote("8", "n^2 = 7")
    assert vote("8", "N = 15,600") == vote("8", "15600")
    assert vote("8", r"x = 7 \text{ cm}") == vote("8", r"7 \text{ cm}") == "7cm"
    assert len({vote("8", answer) for answer in ("7", "2x = 7", "x = 7, y = 6", "6 = 7", "x = 6")}) == 5
    assert vote("y = 2x", "y = 3x") != vote("y = 2x", "y = 4x")
    assert vote("8", "x = 8") == vote("8", "8")


@pytest.mark.skipif(not OUTPUTS.exists(), reason="needs ../shared/data/grading_outputs.jsonl")
def test_on_real_answers_a_wrong_one_never_has_the_golds_vote() -> None:
    """And most right ones have it by their own normal form, before the verifier's word makes it so."""
    right = alike = 0
    for line in OUTPUTS.read_text().splitlines():
        row = json.loads(line)
        answer = last_box(row["pred"])
        if not answer:
            continue
        same = normal_form(answer) == normal_form(row["gold"])
        if compare(row["gold"], answer).correct:
            right, alike = right + 1, alike + same
        else:
            assert not same, (row["gold"], answer)
    assert right > 50
    assert alike > 0.9 * right, (alike, right)
