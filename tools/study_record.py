"""The numbers that docs/study keeps of a run: enough for every table and figure, in some 20 kB."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from rloop_mcore.analysis.answers import read_answers
from rloop_mcore.analysis.checkpoints import rl_checkpoints
from rloop_mcore.analysis.curves import experts, rl_step, seconds_by_stage, training
from rloop_mcore.analysis.read_run import Run, read_run

STEP_METRICS = ("success_rate", "entropy", "grad_norm", "grad_norm_max", "response_length")


def record_of(path: Path) -> dict[str, Any]:
    """What a finished run did, as JSON:

    - checkpoints: in the order of training, each with its name, iteration, phase ("base", "explore", "exploit"), RL
      steps before it, and of each validation problem (sorted by id) how many of `samples` responses were right
    - similarity: {rl_steps, iterations, matrix}: S over theta_0 and the RL checkpoints (analysis/similarity.py)
    - steps: {metric: value of every RL step}
    - experts: {trajectories, problems}: of each iteration's fine-tuning
    - cost: {sampled: trajectories, sampled_tokens, rl_tokens and rft_tokens: trained on, seconds: of phases}
    """
    run = read_run(path)
    checkpoints = [
        {
            "name": each.name,
            "iteration": each.iteration,
            "phase": each.phase,
            "rl_steps": rl_step(run, each),
            **_counts(run.samples_file(each)),
        }
        for each in run.evaluations
    ]
    return {
        "checkpoints": checkpoints,
        "similarity": _similarity(run),
        "steps": {key: [_short(value) for value in training(run, key).y] for key in STEP_METRICS},
        "experts": {"trajectories": experts(run, "experts").y, "problems": experts(run, "problems").y},
        "cost": _cost(run),
    }


def held_out_counts(result: Path) -> dict[str, Any]:
    """{benchmark: right responses of each problem, sorted by id} of the JSON of `rloop evaluate`, and `samples`."""
    benchmarks = json.loads(result.read_text(encoding="utf-8"))["benchmarks"]
    counts = {name: [pair for _, pair in sorted(each["counts"].items())] for name, each in benchmarks.items()}
    (samples,) = {pair[1] for pairs in counts.values() for pair in pairs}
    right = {name.removeprefix("countdown-"): [pair[0] for pair in pairs] for name, pairs in counts.items()}
    return {"samples": samples, **right}


def _counts(samples: Path) -> dict[str, Any]:
    answers = read_answers(samples)
    problems = len(answers.problems)
    right = np.bincount(answers.problem, weights=answers.correct, minlength=problems).astype(int).tolist()
    return {"samples": len(answers) // problems, "right": right}


def _similarity(run: Run) -> dict[str, Any]:
    found = rl_checkpoints(run)
    places, _, _, matrix = found.similarity()
    return {
        "rl_steps": [found.rl_steps[place] for place in places],
        "iterations": [found.iterations[place] for place in places],
        "matrix": [[_short(value) for value in row] for row in matrix.tolist()],
    }


def _cost(run: Run) -> dict[str, float]:
    group = int(run.settings["algorithm"]["group_size"])
    explore = [line for line in run.metrics if line["phase"] == "explore"]
    exploit = [line for line in run.metrics if line["phase"] == "exploit"]
    return {
        "sampled": group * sum(line["groups_sampled"] for line in explore),
        "sampled_tokens": sum(line["sampled_tokens"] for line in explore),
        "rl_tokens": sum(line.get("tokens", 0.0) for line in explore),
        "rft_tokens": sum(line.get("tokens", 0.0) for line in exploit),
        "seconds": round(sum(seconds_by_stage(run).values()), 1),
    }


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
