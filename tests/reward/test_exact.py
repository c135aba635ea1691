"""The verifiers that compare texts and letters."""

import pytest

from rloop_mcore.config import RewardConfig
from rloop_mcore.reward.exact import grade_choice, grade_exact
from rloop_mcore.reward.pool import RewardPool
from rloop_mcore.types import Problem


@pytest.mark.parametrize(
    ("gold", "response", "reason"),
    [
        ("red fox", r"\boxed{red fox}", "correct"),
        ("red fox", "\\boxed{ red \n fox }", "correct"),
        ("red fox", r"\boxed{Red fox}", "wrong"),
        ("1/2", r"\boxed{0.5}", "wrong"),
        ("red fox", "red fox", "no_answer"),
    ],
)
def test_exact(gold: str, response: str, reason: str) -> None:
    verdict = grade_exact(Problem("p", "", gold), response, False, "boxed")
    assert (verdict.correct, verdict.reason) == (reason == "correct", reason)


@pytest.mark.parametrize(
    ("gold", "answer", "reason"),
    [
        *[
            ("C", answer, "correct")
            for answer in ("C", "(C)", "c", "C.", "C)", r"\text{(C)}", r"\textbf{C}", r"\mathrm{C}:")
        ],
        ("(C)", "C", "correct"),
        ("C", "D", "wrong"),
        *[("C", answer, "unparsable") for answer in ("C, D", "CD", "3", "C or D", "the third", r"\text{C and D}")],
    ],
)
def test_choice(gold: str, answer: str, reason: str) -> None:
    verdict = grade_choice(Problem("p", "", gold), rf"so \boxed{{{answer}}}", False, "boxed")
    assert (verdict.correct, verdict.reason) == (reason == "correct", reason)


def test_both_by_name_in_the_pool() -> None:
    for name in ("exact", "choice"):
        with RewardPool(RewardConfig(verifier=name, workers=1)) as pool:
            items = [(Problem("p", "", "C"), rf"\boxed{{{answer}}}", False) for answer in "CD"]
            assert [verdict.correct for verdict in pool.grade(items)] == [True, False]
