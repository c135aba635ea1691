"""The rule-based reward: what a verdict is worth."""

from __future__ import annotations

from rloop_mcore.types import Verdict

_NOT_IN_FORMAT = ("no_answer", "truncated", "unparsable")


def verdict_reward(verdict: Verdict, correct: float, wrong: float, format_penalty: float) -> float:
    """`correct` or `wrong`, less `format_penalty` where no answer could be read in the response.

    1 and 0 in RLoop (arXiv 2511.04285), 1 and -1 in DAPO (arXiv 2503.14476, section 2.4), both without a format term.
    A timeout or crash is the verifier's, and no fault of the format.
    """
    if verdict.correct:
        return correct
    return wrong - format_penalty if verdict.reason in _NOT_IN_FORMAT else wrong
