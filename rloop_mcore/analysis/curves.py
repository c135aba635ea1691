"""The series behind the report's figures: pure functions of what a run has written.

The common x axis is the RL step counted over all iterations, so that three iterations of 200 steps lie over a
vanilla run of 600.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rloop_mcore.analysis.read_run import Evaluation, Run


@dataclass(frozen=True, slots=True)
class Series:
    """Points of a curve; `None` in `y` breaks the line. `low` and `high` are empty or as long as `y`."""

    x: list[int] = field(default_factory=list)
    y: list[float | None] = field(default_factory=list)
    low: list[float | None] = field(default_factory=list)
    high: list[float | None] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(value is not None for value in self.y)


def training(run: Run, key: str) -> Series:
    """A metric of the exploration steps over RL steps, e.g. `success_rate`, `entropy`, `grad_norm`."""
    series = Series()
    for line in _explore_lines(run):
        if key in line:
            series.x.append(line["global_step"])
            series.y.append(line[key])
    return series


def validation(run: Run, metric: str, source: str | None = None) -> Series:
    """A validation metric over RL steps with its interval, of all problems or of those of one source; each iteration's
    line starts at its own theta_i.

    Iteration i's line is theta_i followed by the RL checkpoints of i; the jump to theta_{i+1} between two lines is
    the reset. theta_I, from which nothing starts, stands alone at the end.
    """
    series = Series()
    for evaluation in run.evaluations:
        metrics = evaluation.metrics if source is None else evaluation.sources.get(source, {})
        if metric not in metrics:
            continue
        x = rl_step(run, evaluation)
        if evaluation.phase == "exploit":
            _append(series, x, None, "")
        _append(series, x, metrics[metric], checkpoint_label(evaluation))
    return series


def overfitting_gap(run: Run) -> Series:
    """Training success minus validation Avg@N at each RL checkpoint (the paper's figure 1 in one number).

    Training success is the mean of `success_rate` over the RL steps of the iteration since its checkpoint before, so
    that both sides are of about the same policy; x is the RL step.
    """
    series, before = Series(), (-1, 0)
    for evaluation in run.evaluations:
        if evaluation.phase != "explore":
            continue
        first = before[1] if before[0] == evaluation.iteration else 0
        rates = [
            rate
            for line in _explore_lines(run)
            if line["iteration"] == evaluation.iteration and first < line["step"] <= evaluation.step
            if (rate := line.get("success_rate")) is not None
        ]
        before = evaluation.iteration, evaluation.step
        if rates:
            series.x.append(rl_step(run, evaluation))
            series.y.append(sum(rates) / len(rates) - evaluation.average)
    return series


def thetas(run: Run, metric: str) -> Series:
    """A validation metric of theta_0, theta_1, ... theta_I over the iteration."""
    series = Series()
    for evaluation in run.evaluations:
        if evaluation.phase in ("base", "exploit") and metric in evaluation.metrics:
            x = 0 if evaluation.phase == "base" else evaluation.iteration + 1
            _append(series, x, evaluation.metrics[metric], checkpoint_label(evaluation))
    return series


def rl_endpoints(run: Run, metric: str) -> Series:
    """A validation metric of the last RL checkpoint of each iteration; x is the number of iterations explored."""
    last = {evaluation.iteration: evaluation for evaluation in run.evaluations if evaluation.phase == "explore"}
    series = Series()
    for iteration, evaluation in last.items():
        if metric in evaluation.metrics:
            _append(series, iteration + 1, evaluation.metrics[metric], checkpoint_label(evaluation))
    return series


def experts(run: Run, key: str) -> Series:
    """`experts` (trajectories selected) or `problems` (that they solve) of each iteration; x counts from 1."""
    series = Series()
    for record in run.journal:
        if record.get("event") == "done" and record.get("phase") == "select" and key in record:
            series.x.append(record["iteration"] + 1)
            series.y.append(record[key])
    return series


def seconds_by_stage(run: Run) -> dict[str, float]:
    """Seconds spent in each stage ("generate", "grade", "update", ...) over all logged steps."""
    totals: dict[str, float] = {}
    for line in run.metrics:
        for stage, seconds in _seconds(line).items():
            totals[stage] = totals.get(stage, 0.0) + seconds
    return totals


def fine_tuning_share(run: Run) -> dict[str, float]:
    """RFT's share of the tokens trained on and of the seconds spent, each in [0, 1]; a key is left out if unknown."""

    def totals(phase: str) -> dict[str, float]:
        lines = [line for line in run.metrics if line["phase"] == phase]
        seconds = sum(sum(_seconds(line).values()) for line in lines)
        return {"tokens": sum(line.get("tokens") or 0 for line in lines), "seconds": seconds}

    rl, rft = totals("explore"), totals("exploit")
    return {name: rft[name] / (rl[name] + rft[name]) for name in rl if rl[name] and rft[name]}


def rl_steps(run: Run) -> int:
    """RL steps logged so far, over all iterations."""
    return sum(_steps_by_iteration(run).values())


def iterations(run: Run) -> list[int]:
    """The iterations that have RL steps so far, from 0."""
    return sorted(_steps_by_iteration(run))


def steps_before(run: Run, iteration: int) -> int:
    """RL steps of the iterations before this one."""
    return sum(steps for earlier, steps in _steps_by_iteration(run).items() if earlier < iteration)


def rl_step(run: Run, evaluation: Evaluation) -> int:
    """The RL steps taken before a checkpoint, over all iterations."""
    if evaluation.phase == "explore":
        return steps_before(run, evaluation.iteration) + evaluation.step
    return 0 if evaluation.phase == "base" else steps_before(run, evaluation.iteration + 1)


def ended_early(run: Run) -> list[int]:
    """The iterations, from 0, whose exploration the guard ended before all its steps."""
    guarded = [record for record in run.journal if record.get("event") == "guard" and record["phase"] == "explore"]
    return sorted({record["iteration"] for record in guarded if record["policy"] == "end_phase" and record["early"]})


def iteration_starts(run: Run) -> list[int]:
    """The RL steps after which an iteration later than the first begins: where policies are reset to theta_i."""
    return [steps_before(run, iteration) for iteration in iterations(run) if iteration > 0]


def checkpoint_label(evaluation: Evaluation) -> str:
    """How a checkpoint is called in tables and on hover."""
    match evaluation.phase:
        case "base":
            return "θ0"
        case "explore":
            return f"RL, iteration {evaluation.iteration + 1}, step {evaluation.step}"
        case "exploit":
            return f"θ{evaluation.iteration + 1}"
    return f"{evaluation.phase}, step {evaluation.step}"


def _steps_by_iteration(run: Run) -> dict[int, int]:
    steps: dict[int, int] = {}
    for line in _explore_lines(run):
        steps[line["iteration"]] = max(line["step"], steps.get(line["iteration"], 0))
    return steps


def _seconds(line: dict[str, Any]) -> dict[str, float]:
    """Of a step, by stage."""
    stages = {key.removeprefix("seconds_"): value for key, value in line.items() if key.startswith("seconds_")}
    return {stage: value for stage, value in stages.items() if value is not None}


def _explore_lines(run: Run) -> list[dict[str, Any]]:
    return [line for line in run.metrics if line["phase"] == "explore"]


def _append(series: Series, x: int, metric: dict[str, float] | None, label: str) -> None:
    series.x.append(x)
    series.labels.append(label)
    series.y.append(metric["mean"] if metric else None)
    series.low.append(metric["low"] if metric else None)
    series.high.append(metric["high"] if metric else None)
