"""Answers with known verdicts: each worker grades them before all else, so that a broken verifier stops the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rloop_mcore.config import RewardConfig
from rloop_mcore.errors import UserError
from rloop_mcore.types import Problem

# (gold, answer, is it right)
CANARIES = [
    ("42", "42", True),
    ("42", "43", False),
    (r"\frac{1}{2}", "0.5", True),
    (r"\frac{1}{2}", r"\frac{1}{3}", False),
    (r"2\sqrt{3}", r"\sqrt{12}", True),
    ("50", r"50\%", True),
    ("(x+1)^2", "x^2+2x+1", True),
    ("(x+1)^2", "x^2+x+1", False),
    ("[0,1)", "[0,1]", False),
    (r"\{1,2\}", r"\{2,1\}", True),
    ("1.6e-19", "1.7e-19", False),
    ("2", "2ab", False),
    (r"5 \text{ hours}", r"5 \text{ minutes}", False),
    (r"\text{Evelyn}", "Evelyn", True),
]
_FORMS = {"boxed": r"so \boxed{{{}}}", "answer_line": "Answer: {}"}


def canary_items(config: RewardConfig) -> list[tuple[Problem, str, bool]]:
    """The canaries as (problem, response, truncated); none for a verifier that is not `math`."""
    if config.verifier != "math":
        return []
    form = _FORMS[config.answer_format]
    return [(Problem("canary", "", gold), form.format(answer), False) for gold, answer, _ in CANARIES]


def check_canaries(config: RewardConfig, verdicts: Sequence[Any]) -> None:
    """UserError if one of the verdicts, which begin (correct, reason), is not the known one."""
    if config.verifier != "math":
        return
    for (gold, answer, right), (correct, reason, *_) in zip(CANARIES, verdicts, strict=True):
        if correct != right:
            raise UserError(
                f"the math verifier is broken here: it calls the answer {answer!r} to the gold answer {gold!r} "
                f"{reason}, not {'correct' if right else 'wrong'}; check the installed versions of "
                "math-verify, latex2sympy2_extended, sympy and antlr4-python3-runtime"
            )
