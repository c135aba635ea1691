"""Training problems that an evaluation set holds too, as the same text or a run of 13 words of it, and those that
contradict each other."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from rloop_mcore.types import Problem

WORDS = 13  # the n-gram of GPT-3's contamination study (arXiv 2005.14165, appendix C)

_BESIDE_WORDS = re.compile(r"(?:[^\w\\{}^+*/=<>.-]|(?<!\d)\.|\.(?!\d))+")  # a decimal point is none of it


def overlapping(problems: Iterable[Problem], evaluation: Iterable[Problem]) -> dict[str, str]:
    """The ids of those of `problems` that `evaluation` holds too, each with how: "exact" or "13-gram".

    Exact: equal but for case, spaces and punctuation, and not made of punctuation alone. A problem of fewer than 13
    words overlaps only exactly. A run that stands in several problems of `evaluation` is a turn of phrase ("where m and
    n are relatively prime positive integers"), and tells nothing.
    """
    texts: set[str] = set()
    runs: Counter[tuple[str, ...]] = Counter()
    for problem in evaluation:
        words = _words(problem)
        if (text := "".join(words)) not in texts:  # one that stands there twice is no turn of phrase
            texts.add(text)
            runs.update(set(_runs(words)))
    found = {}
    for problem in problems:
        words = _words(problem)
        if words and "".join(words) in texts:
            found[problem.id] = "exact"
        elif any(runs[run] == 1 for run in _runs(words)):
            found[problem.id] = f"{WORDS}-gram"
    return found


def contradicting(problems: Iterable[Problem]) -> dict[str, str]:
    """The ids of those of `problems` whose text an earlier one has with another answer, each with the two answers.

    Texts are equal as in `overlapping`, answers but for spaces around them: 0.5 is another than 1/2 here.
    """
    first: dict[str, Problem] = {}
    found = {}
    for problem in problems:
        if not (words := _words(problem)):
            continue
        earlier = first.setdefault("".join(words), problem)
        if problem.answer.strip() != earlier.answer.strip():
            found[problem.id] = f"answer {problem.answer:.40}, which is {earlier.answer:.40} in {earlier.id}"
    return found


def _words(problem: Problem) -> list[str]:
    return _BESIDE_WORDS.sub(" ", problem.problem.casefold().replace("$", "")).split()


def _runs(words: Sequence[str]) -> Iterable[tuple[str, ...]]:
    return (tuple(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1))
