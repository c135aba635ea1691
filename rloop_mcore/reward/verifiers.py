"""Verifiers by name: the shipped ones, and yours by a dotted path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rloop_mcore.platform.plugin import load_function
from rloop_mcore.types import Problem, Verdict

# (problem, response, truncated, answer_format) -> a Verdict, or just (correct, reason)
Verifier = Callable[[Problem, str, bool, str], Verdict | tuple[bool, str]]

# (problem, response, truncated, answer_format) -> what the response votes for in a majority; "" for nothing
Vote = Callable[[Problem, str, bool, str], str]

SHIPPED = {
    "math": "rloop_mcore.reward.math:grade_math",
    "exact": "rloop_mcore.reward.exact:grade_exact",
    "choice": "rloop_mcore.reward.exact:grade_choice",
    "countdown": "rloop_mcore.reward.countdown:grade_countdown",
}
VOTES = {"math": "rloop_mcore.reward.votes:vote_math", "countdown": "rloop_mcore.reward.countdown:vote_countdown"}
REASONS = frozenset({"correct", "wrong", "no_answer", "unparsable", "timeout", "crashed", "truncated"})


def load_verifier(name: str) -> Verifier:
    """The function behind `reward.verifier`: a shipped name or `package.module:function`; else a UserError."""
    function: Verifier = load_function("reward.verifier", name, SHIPPED)
    return function


def load_vote(name: str) -> Vote | None:
    """How answers to a verifier vote; None where they do not."""
    return load_function("reward.verifier", name, VOTES) if name in VOTES else None


def as_verdict(result: Any) -> Verdict:
    """What a verifier returned, as a Verdict; TypeError if it is neither a Verdict nor (correct, known reason)."""
    if isinstance(result, tuple) and len(result) == 2:
        result = Verdict(*result)
    if not isinstance(result, Verdict) or not isinstance(result.correct, bool) or result.reason not in REASONS:
        reasons = ", ".join(sorted(REASONS))
        raise TypeError(
            f"a verifier must return a Verdict or (bool, reason) with a reason of {reasons}; got {result!r}"
        )
    return result
