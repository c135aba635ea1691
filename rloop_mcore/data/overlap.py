"""Training problems that an evaluation set holds too: the same text, or a run of 13 words of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rloop_mcore.types import Problem

WORDS = 13  # the n-gram of GPT-3's contamination study (arXiv 2005.14165, appendix C)

_WORD = re.compile(r"[a-z]+|[0-9]+(?:\.[0-9]+)?|\\[a-z]+|[^\s\w$]")


def overlapping(problems: Iterable[Problem], evaluation: Iterable[Problem]) -> dict[str, str]:
    """The ids of those of `problems` that `evaluation` holds too, each with how: "exact" or "13-gram".

    Exact: equal but for case, spaces and dollar signs. A problem of fewer than 13 words overlaps only exactly.
    """
    texts: set[tuple[str, ...]] = set()
    runs: set[tuple[str, ...]] = set()
    for problem in evaluation:
        words = _words(problem)
        texts.add(tuple(words))
        runs.update(_runs(words))
    found = {}
    for problem in problems:
        words = _words(problem)
        if tuple(words) in texts:
            found[problem.id] = "exact"
        elif any(run in runs for run in _runs(words)):
            found[problem.id] = f"{WORDS}-gram"
    return found


def _words(problem: Problem) -> list[str]:
    return _WORD.findall(problem.problem.casefold())


def _runs(words: Sequence[str]) -> Iterable[tuple[str, ...]]:
    return (tuple(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1))
