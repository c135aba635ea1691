"""What the report's trajectory browser holds of a run: every problem in numbers, and some responses as texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rloop_mcore.analysis import curves
from rloop_mcore.analysis.answers import read_answers
from rloop_mcore.analysis.checkpoints import spread
from rloop_mcore.analysis.maths import Formulas
from rloop_mcore.analysis.read_run import Run
from rloop_mcore.analysis.samples import read_rows, read_samples
from rloop_mcore.analysis.showcase import PROBLEMS, Wanted, interesting, telling, within
from rloop_mcore.analysis.training_problems import TrainingProblems

STEPS = 96  # RL steps that responses are taken from
VISITS = 12  # of a problem: steps, or checkpoints
_COLUMNS = ["sample", "correct", "reward", "prompt_ids", "response_ids", "reason", "finish_reason"]


@dataclass(frozen=True)
class Words:
    """How token ids become text, where the run's tokenizer is at hand; `statements` are problems by their ids."""

    decode: Callable[[Sequence[int]], str] | None = None
    statements: Mapping[str, str] = field(default_factory=dict)

    def text(self, ids: Sequence[int]) -> str:
        return self.decode(ids) if self.decode is not None else "token ids " + " ".join(map(str, ids))


def browser(run: Run, words: Words, formulas: Formulas, characters: int) -> dict[str, Any]:
    """As the page takes it; about `characters` of responses at most, half of them of training.

    {"run", "trajectories": in the cache, "visits": [{"label", "kind", "step"}], "problems": [{"id", "kind", "asked",
    "right", "hard", "rft", "first", "lost", "history": [[visit, right, asked]], "prompt"}], "responses": [{...}]};
    a problem without responses here has no "prompt", and a training problem then no "history".
    """
    held: dict[str, Any] = {"run": run.name, "visits": [], "problems": [], "responses": []}
    held["trajectories"] = _add_training(held, run, words, formulas, characters // 2)
    _add_validation(held, run, words, formulas, characters // 2)
    return held


def _add_training(held: dict[str, Any], run: Run, words: Words, formulas: Formulas, characters: int) -> int:
    samples = read_samples(run.path / "cache")
    if not len(samples):
        return 0
    problems = TrainingProblems.of(run, samples)
    held["problems"] = problems.facts()
    steps = np.unique(problems.step)
    visits = {int(step): visit for visit, step in enumerate(steps)}
    held["visits"] = [{"label": _label(run, step), "kind": "train", "step": step} for step in visits]
    shown = np.isin(problems.step, steps[spread(len(steps), STEPS)])
    wanted = []
    for problem in interesting(problems, np.bincount(samples.problem[shown], minlength=len(samples.problems)) > 0):
        mine = np.flatnonzero(samples.problem == problem)
        held["problems"][problem]["history"] = _history(problems.step[mine], samples.correct[mine], visits)
        mine = mine[shown[mine]]
        places = np.unique(problems.step[mine])
        for place in places[spread(len(places), VISITS)].tolist():
            rows = mine[problems.step[mine] == place]
            told = telling(rows, samples.correct[rows], problems.trained[rows] >= 0)
            wanted += [
                Wanted(rank, problem, visits[place], row, int(samples.length[row])) for rank, row in enumerate(told)
            ]
    kept = within(wanted, characters)
    texts: dict[int, dict[str, Any]] = {}
    for shard in {int(samples.shard[each.row]) for each in kept}:
        rows = [each.row for each in kept if samples.shard[each.row] == shard]
        there = read_rows(samples.shards[shard], samples.row[rows].tolist(), _COLUMNS)
        texts |= {row: there[int(samples.row[row])] for row in rows}
    for each in kept:
        found = texts[each.row]
        held["problems"][each.problem].setdefault("prompt", formulas.mark(words.text(found["prompt_ids"])))
        text = formulas.mark(words.text(found["response_ids"]))
        held["responses"].append(_response(each, found, text, int(problems.trained[each.row]) + 1))
    return len(samples)


def _add_validation(held: dict[str, Any], run: Run, words: Words, formulas: Formulas, characters: int) -> None:
    paths = [(each, run.samples_file(each)) for each in run.evaluations]
    there = [(evaluation, path) for evaluation, path in paths if path.exists()]
    shown, numbers = spread(len(there), VISITS), dict[str, int]()
    for place, (evaluation, path) in enumerate(there):
        answers, visit, step = read_answers(path), len(held["visits"]), curves.rl_step(run, evaluation)
        held["visits"].append({"label": curves.checkpoint_label(evaluation), "kind": "validation", "step": step})
        for name in answers.problems:
            if name not in numbers:
                numbers[name] = len(held["problems"])
                facts = {"id": name, "kind": "validation", "asked": 0, "right": 0, "hard": [], "rft": []}
                held["problems"].append(facts | {"first": None, "lost": False, "history": []})
            rows = answers.rows_of(name)
            _count(held["problems"][numbers[name]], visit, step, int(answers.correct[rows].sum()), len(rows))
        if place not in shown:
            continue
        wanted = []
        for name in [answers.problems[i] for i in spread(len(answers.problems), PROBLEMS)]:
            rows = answers.rows_of(name)
            told = telling(rows, answers.correct[rows], np.zeros(len(rows), bool))
            wanted += [
                Wanted(rank, numbers[name], visit, row, len(answers.response(row))) for rank, row in enumerate(told)
            ]
        kept = within(wanted, characters // len(shown))
        texts = read_rows(path, [each.row for each in kept])
        for each in kept:
            found = texts[each.row]
            prompt = found.get("prompt_ids")
            statement = words.text(prompt) if prompt else words.statements.get(found["problem_id"], "")
            held["problems"][each.problem].setdefault("prompt", formulas.mark(statement))
            text = words.text(found["response_ids"]) if words.decode or "text" not in found else found["text"]
            held["responses"].append(_response(each, found, formulas.mark(text)))


def _response(each: Wanted, found: Mapping[str, Any], text: str, rft: int = 0) -> dict[str, Any]:
    """As the page takes it; `rft` is the iteration, from 1, whose RFT was trained on it, or 0."""
    return {
        "problem": each.problem,
        "visit": each.visit,
        "sample": found["sample"],
        "correct": found["correct"],
        "reward": round(float(found.get("reward", found["correct"])), 4),
        "tokens": each.length,
        "reason": found["reason"],
        "finish": found["finish_reason"],
        "rft": rft,
        "text": text,
    }


def _count(facts: dict[str, Any], visit: int, step: int, right: int, asked: int) -> None:
    """Add a checkpoint's answers to a validation problem."""
    facts["asked"] += asked
    facts["right"] += right
    facts["history"].append([visit, right, asked])
    facts["first"] = step if right and facts["first"] is None else facts["first"]
    facts["lost"] = bool(facts["right"] and not right)


def _history(steps: np.ndarray, correct: np.ndarray, visits: Mapping[int, int]) -> list[list[int]]:
    """[visit, right, asked] of each step that a problem was sampled in."""
    places, inverse, counts = np.unique(steps, return_inverse=True, return_counts=True)
    right = np.bincount(inverse, weights=correct).astype(int)
    return [[visits[int(p)], int(r), int(c)] for p, r, c in zip(places, right, counts, strict=True)]


def _label(run: Run, step: int) -> str:
    begun = [i for i in curves.iterations(run) if curves.steps_before(run, i) < step] or [0]
    return f"RL, iteration {begun[-1] + 1}, step {step - curves.steps_before(run, begun[-1])}"
