"""The numbers of an evaluation, from its graded samples: headline metrics, majorities, groups of problems."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rloop_mcore.evaluation.bootstrap import bootstrap_interval
from rloop_mcore.evaluation.majority import majority_at_k
from rloop_mcore.evaluation.pass_at_k import average, pass_at_k
from rloop_mcore.evaluation.sampling import Graded
from rloop_mcore.types import Problem

_GROUP_RESAMPLES = 2_000  # there may be dozens of groups
_MOST_SOURCES = 20  # where there are more, they say where single problems are from

Scores = dict[str, list[float]]  # metric -> its value for each problem, in one order of problems


def counts_of(rows: Sequence[Graded]) -> dict[str, list[int]]:
    """{problem id: [correct samples, samples]}, in the order of `rows`."""
    counts: dict[str, list[int]] = {}
    for row in rows:
        count = counts.setdefault(row.problem_id, [0, 0])
        count[0] += row.correct
        count[1] += 1
    return counts


def scores_of(rows: Sequence[Graded], samples: int, ks: Sequence[int]) -> Scores:
    """Avg@n and pass@k of each problem, in the order of `rows`; `samples` is n, and what Avg@n is called after."""
    successes, drawn = zip(*counts_of(rows).values(), strict=True)
    scores = {f"avg@{samples}": average(successes, drawn).tolist()}
    return scores | {f"pass@{k}": pass_at_k(successes, drawn, k).tolist() for k in sorted(set(ks))}


def majorities(rows: Sequence[Graded], votes: Sequence[str], ks: Sequence[int]) -> Scores:
    """maj@k of each problem for k > 1 (maj@1 is Avg@n once more), in the order of `counts_of`.

    `votes` [rows] are what the samples vote for. A vote that is right for some of its samples only is so in part.
    """
    samples: Counter[str] = Counter()
    choices: dict[str, dict[str, list[int]]] = {}
    for row, vote in zip(rows, votes, strict=True):
        samples[row.problem_id] += 1
        mine = choices.setdefault(row.problem_id, {})
        if vote:
            count = mine.setdefault(vote, [0, 0])
            count[0] += 1
            count[1] += row.correct
    shares = {id: [(count, right / count) for count, right in mine.values()] for id, mine in choices.items()}
    return {
        f"maj@{k}": [majority_at_k(mine, samples[id], k) for id, mine in shares.items()]
        for k in sorted(set(ks))
        if k > 1
    }


def intervals(scores: Scores, seed: int, resamples: int = 10_000) -> dict[str, dict[str, float]]:
    """{metric: {"mean", "low", "high"}} over the problems."""
    return {key: asdict(bootstrap_interval(values, seed, resamples)) for key, values in scores.items()}


def summary(rows: Sequence[Graded]) -> dict[str, Any]:
    """Mean length in tokens, share cut at the token limit, verdicts by reason, counts by problem."""
    return {
        "response_length": sum(len(row.response_ids) for row in rows) / len(rows),
        "truncated": sum(row.finish_reason == "length" for row in rows) / len(rows),
        "reasons": dict(sorted(Counter(row.reason for row in rows).items())),
        "counts": counts_of(rows),
    }


def breakdown(
    problems: Sequence[Problem], rows: Sequence[Graded], scores: Scores, seed: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """{"source" | "level" | "subject": {value: problems, metrics, mean length, share truncated}}, the last two by meta.

    `scores` are in the order of `problems`. Of a path "Mathematics -> Algebra -> ..." the second part counts; a problem
    with several subjects is in each of them. Where all problems are in one group there are none; more than 20
    sources are none either.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for key in ("source", "level", "subject"):
        members: dict[str, list[int]] = {}
        for place, problem in enumerate(problems):
            for value in _values(problem.source if key == "source" else problem.meta.get(key)):
                members.setdefault(value, []).append(place)
        if 1 < len(members) <= (_MOST_SOURCES if key == "source" else math.inf):
            order = sorted(members, key=_numbers_first)
            found[key] = {value: _group(problems, members[value], rows, scores, seed) for value in order}
    return found


def _group(
    problems: Sequence[Problem], places: Sequence[int], rows: Sequence[Graded], scores: Scores, seed: int
) -> dict[str, Any]:
    ids = {problems[place].id for place in places}
    chosen = {key: [values[place] for place in places] for key, values in scores.items()}
    mine = [row for row in rows if row.problem_id in ids]
    return {
        "problems": len(places),
        "metrics": intervals(chosen, seed, _GROUP_RESAMPLES),
        "response_length": sum(len(row.response_ids) for row in mine) / len(mine),
        "truncated": sum(row.finish_reason == "length" for row in mine) / len(mine),
    }


def _values(value: Any) -> list[str]:
    """The groups that a value puts a problem in, once each."""
    if value is None or value == "":
        return []
    values = value if isinstance(value, list) else [value]
    return list(dict.fromkeys(_name(each) for each in values))


def _name(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    parts = [part.strip() for part in str(value).split("->")]
    return parts[min(1, len(parts) - 1)]


def _numbers_first(value: str) -> tuple[float, str]:
    try:
        return float(value), value
    except ValueError:
        return math.inf, value
