"""Run directories with known content."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.04, "high": mean + 0.05}


def metrics(average: float) -> dict[str, dict[str, float]]:
    coverage = {1: average, 8: min(1.0, 2 * average), 16: min(1.0, 2.5 * average), 32: min(1.0, 3 * average)}
    return {"avg@32": interval(average)} | {f"pass@{k}": interval(value) for k, value in coverage.items()}


def write_run(
    path: Path,
    averages: dict[str, float],
    iterations: int = 2,
    steps: int = 4,
    experts: tuple[int, ...] = (),
    sources: dict[str, float] | None = None,
) -> Path:
    """A finished run: `averages` are {evaluation name: avg@32}, `sources` {source: avg@32} at each of them; metrics of
    step s of iteration i are made of both."""
    path.mkdir(parents=True)
    lines = []
    for iteration in range(iterations):
        for step in range(1, steps + 1):
            lines.append(explore_line(iteration, step, steps))
        if experts:
            fine_tuning = {"iteration": iteration, "phase": "exploit", "step": 1, "total": 1, "time": 0.0}
            lines.append({**fine_tuning, "global_step": (iteration + 1) * steps, "tokens": 100, "seconds_update": 1.0})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    journal: list[dict[str, Any]] = [{"event": "policy", "iteration": 0, "path": "base"}]
    journal += [
        {"event": "done", "phase": "select", "iteration": iteration, "experts": count, "problems": count // 2}
        for iteration, count in enumerate(experts)
    ]
    (path / "journal.jsonl").write_text("".join(json.dumps(record) + "\n" for record in journal))
    (path / "config.yaml").write_text("run:\n  seed: 0\ndata:\n  train: <script>alert(1)</script>\n")
    (path / "evaluation").mkdir()
    for name, average in averages.items():
        record: dict[str, Any] = {"name": name, "policy": f"policies/{name}", "metrics": metrics(average)}
        if sources is not None:
            record["groups"] = {"source": {source: {"metrics": metrics(mean)} for source, mean in sources.items()}}
        (path / "evaluation" / f"{name}.json").write_text(json.dumps(record))
    return path


def explore_line(iteration: int, step: int, steps: int) -> dict[str, Any]:
    global_step = iteration * steps + step
    place = {"iteration": iteration, "phase": "explore", "step": step, "total": steps, "global_step": global_step}
    return {
        **place,
        "time": 1000.0 + global_step,
        "success_rate": min(1.0, 0.1 + 0.9 * step / steps),
        "reward_mean": 0.9 * step / steps,
        "entropy": 0.5 / global_step,
        "grad_norm": None if step == 2 else 0.3,
        "tokens": 300,
        "seconds_generate": 2.0,
        "seconds_update": 1.0,
    }


RLOOP = {
    "base": 0.06,
    "i0_explore_000002": 0.10,
    "i0_explore_000004": 0.14,
    "i0_exploit_000000": 0.08,
    "i1_explore_000004": 0.20,
    "i1_exploit_000000": 0.12,
}
DAPO = {"base": 0.06, "i0_explore_000004": 0.15, "i0_explore_000008": 0.13}


@pytest.fixture
def rloop_run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "rloop", RLOOP, experts=(30, 12))


@pytest.fixture
def dapo_run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "dapo", DAPO, iterations=1, steps=8)


@pytest.fixture
def make_run() -> Callable[..., Path]:
    return write_run
