"""The verifier of `step_vs_trl.py` and `one_step_off.py`; not in `common.py`: TRL's environment has no rloop_mcore."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from common import even_length

from rloop_mcore.types import Problem, Verdict


class EvenRewards:
    """`protocols.Rewards` in this process: an even number of words is correct."""

    def grade(self, items: Iterable[tuple[Problem, str, bool]]) -> list[Verdict]:
        return [Verdict(even, "correct" if even else "wrong") for even in (even_length(text) for _, text, _ in items)]

    def votes(self, items: Sequence[tuple[Problem, str, bool]]) -> list[str]:
        return [""] * len(items)
