"""A run's evaluated checkpoints as the matrices take them: who solves what, and how alike the solutions are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from rloop_mcore.analysis.answers import Answers, read_answers
from rloop_mcore.analysis.coverage import distinct_solutions
from rloop_mcore.analysis.curves import rl_step
from rloop_mcore.analysis.forgetting import solved_matrix
from rloop_mcore.analysis.read_run import Run
from rloop_mcore.analysis.similarity import similarity_matrix

SIMILARITY_CHECKPOINTS = 24  # compared at most, evenly spaced
SIMILARITY_PROBLEMS = 40


@dataclass(frozen=True, slots=True)
class _File:
    """One that has been replaced is another: what is known of it is read again."""

    path: Path
    changed_ns: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Evaluated policies in the order of training; all sequences and first axes are [checkpoints].

    `names` are short: θ0, or iteration · step. `solved` is bool [checkpoints, problems]; `distinct` the
    mean number of different correct solutions a problem.
    """

    names: list[str]
    rl_steps: list[int]
    iterations: list[int]
    problems: list[str]
    solved: np.ndarray
    distinct: list[float]
    files: list[_File]

    def __len__(self) -> int:
        return len(self.rl_steps)

    def similarity(self) -> tuple[list[int], int, list[float], np.ndarray]:
        """(checkpoints compared, number of problems, samples a problem of each checkpoint, S over them).

        See `similarity.similarity_matrix`.
        """
        compared = spread(len(self), SIMILARITY_CHECKPOINTS)
        return compared, *_similarity(tuple(self.files[i] for i in compared))


def rl_checkpoints(run: Run) -> Checkpoints:
    """theta_0 and the RL checkpoints of a run whose responses are there."""
    paths = [(each, run.samples_file(each)) for each in run.evaluations if each.phase in ("base", "explore")]
    there = [(each, _file(path)) for each, path in paths if path.exists()]
    summaries = [_summary(file) for _, file in there]
    problems, solved = solved_matrix([summary.verdicts for summary in summaries])
    return Checkpoints(
        names=["θ0" if each.phase == "base" else f"{each.iteration + 1} · {each.step}" for each, _ in there],
        rl_steps=[rl_step(run, each) for each, _ in there],
        iterations=[each.iteration for each, _ in there],
        problems=problems,
        solved=solved,
        distinct=[summary.distinct for summary in summaries],
        files=[file for _, file in there],
    )


def common_steps(first: Checkpoints, second: Checkpoints) -> tuple[list[int], list[int]]:
    """The places in each of the checkpoints that both have, by RL steps taken; theta_0 is one, at 0."""
    shared = sorted(set(first.rl_steps) & set(second.rl_steps))
    return [first.rl_steps.index(step) for step in shared], [second.rl_steps.index(step) for step in shared]


def spread(count: int, limit: int) -> list[int]:
    """At most `limit` of the numbers below `count`, evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(int)).tolist() if count else []


@dataclass(frozen=True, slots=True)
class _Summary:
    """What is kept of an evaluation: `verdicts` have no tokens, `kept` are the responses to some problems."""

    verdicts: Answers
    distinct: float
    kept: Answers


@lru_cache(maxsize=512)
def _summary(file: _File) -> _Summary:
    answers = read_answers(file.path)
    some = [answers.problems[i] for i in spread(len(answers.problems), SIMILARITY_PROBLEMS)]
    return _Summary(answers.without_tokens(), distinct_solutions(answers), answers.only(some))


@lru_cache(maxsize=32)
def _similarity(files: tuple[_File, ...]) -> tuple[int, list[float], np.ndarray]:
    answers = [_summary(file).kept for file in files]
    problems = sorted(set.intersection(*(set(each.problems) for each in answers))) if answers else []
    samples = [len(each) / len(each.problems) if each.problems else 0.0 for each in answers]
    return len(problems), samples, similarity_matrix(answers, problems)


def _file(path: Path) -> _File:
    stat = path.stat()
    return _File(path, stat.st_mtime_ns, stat.st_size)
