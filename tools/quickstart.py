"""The main job of `make quickstart`: base model, RLoop and plain DAPO side by side, held-out evaluation, report.

Everything is a run or an evaluation of the `rloop` command, each in a process of its own; this file only chains them
and shows how far they are. Stopped at any point, the same command goes on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from rloop_mcore.analysis.pick import last_rl_policy, last_theta, pick
from rloop_mcore.analysis.read_run import Evaluation, read_run
from rloop_mcore.analysis.report import write_report
from rloop_mcore.analysis.table import results_table, to_rich
from rloop_mcore.compose import load_config
from rloop_mcore.main.report import words_of
from rloop_mcore.platform.files import write_atomic
from rloop_mcore.platform.process import die_with_parent

ROOT = Path("runs/quickstart")
HELD_OUT = "countdown:test"
HELD_OUT_PROBLEMS = 200
COLUMNS = ("avg@32", "pass@8", "pass@16", "pass@32")  # of the paper's Table 1
STAGE_DEADLINE_S = 3600.0


@dataclass
class Job:
    """One `rloop` command, with a bar in the progress view."""

    title: str
    arguments: Sequence[str]
    log: Path
    run: Path | None = None  # its metrics.jsonl moves the bar
    total: int = 1
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def start(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        parent = os.getpid()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rloop_mcore.main.cli", *self.arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                preexec_fn=lambda: die_with_parent(parent),
            )

    def done(self) -> bool:
        """Whether it ended well; raises SystemExit with the end of its log when it ended badly."""
        assert self.process is not None
        code = self.process.poll()
        if code:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
            raise SystemExit(f"{self.title} ended with exit code {code}; the end of {self.log}:\n{tail}")
        return code == 0

    def progress(self) -> tuple[int, str]:
        """Steps done, and a figure or two of the last one."""
        path = self.run / "metrics.jsonl" if self.run else None
        if path is None or not path.exists():
            return 0, "starting" if self.run else ""
        lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        steps = [line for line in lines if line["phase"] in ("sft", "explore")]
        if not steps:
            return 0, "starting"
        place = {"exploit": "fine-tuning", "evaluate": "validation"}.get(lines[-1]["phase"], "")
        if "success_rate" in steps[-1]:
            return steps[-1]["global_step"], f"success {steps[-1]['success_rate']:.2f} {place}"
        return steps[-1]["global_step"], f"loss {steps[-1]['loss']:.2f} {place}"


def run_together(view: Progress, jobs: Sequence[Job]) -> None:
    """Run the jobs at the same time, to their end."""
    bars: dict[TaskID, Job] = {}
    for job in jobs:
        job.start()
        bars[view.add_task(job.title, total=job.total, note="starting")] = job
    deadline = time.monotonic() + STAGE_DEADLINE_S
    while bars:
        if time.monotonic() > deadline:
            raise SystemExit(f"{', '.join(job.title for job in bars.values())}: not done in {STAGE_DEADLINE_S:.0f} s")
        for bar, job in list(bars.items()):
            steps, note = job.progress()
            view.update(bar, completed=min(steps, job.total), note=note)
            if job.done():
                view.update(bar, completed=job.total, note="done")
                view.stop_task(bar)
                del bars[bar]
        time.sleep(0.5)


def train(experiment: str, title: str) -> Job:
    """A training run by its experiment file."""
    config = load_config([f"experiment={experiment}"])
    run = Path(config.run.dir)
    steps = config.algorithm.iterations * config.algorithm.rl_steps
    if steps == 0:
        assert config.sft.limit is not None
        steps = config.sft.epochs * config.sft.limit // config.sft.batch_size
    return Job(
        title,
        ["train", f"experiment={experiment}", "tracking.progress=false"],
        ROOT / "logs" / f"{experiment}.log",
        run,
        steps,
    )


def evaluation(name: str, run: Path, chosen: Evaluation) -> Job:
    """Held-out Avg@32 and pass@k of a checkpoint."""
    assert chosen.policy is not None
    return Job(
        f"held-out: {name}",
        [
            *("evaluate", "--policy", str(run / chosen.policy), "--data", HELD_OUT, "--json", str(_held_out(name))),
            *("--out", str(ROOT / "evaluations"), "experiment=quickstart", f"evaluation.limit={HELD_OUT_PROBLEMS}"),
        ],
        ROOT / "logs" / "evaluate.log",
    )


class Stopwatch:
    """Seconds of the stages, over every start of this command."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds = json.loads(path.read_text()) if path.exists() else 0.0

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self.seconds = round(self.seconds + time.monotonic() - self._started, 1)
        write_atomic(self._path, json.dumps(self.seconds))


def _is_measured(name: str, run: Path, checkpoint: Evaluation) -> bool:
    """Whether an earlier start of this command has evaluated this very checkpoint."""
    result = _held_out(name)
    if not result.exists() or result.stat().st_mtime < (run / "journal.jsonl").stat().st_mtime:
        return False
    return json.loads(result.read_text())["policy"] == str(run / (checkpoint.policy or ""))


def _held_out(name: str) -> Path:
    return ROOT / "held_out" / f"{name}.json"


def main() -> None:
    """Run everything; prints the table and where the report is."""
    stopwatch = Stopwatch(ROOT / "seconds.json")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    (ROOT / "held_out").mkdir(parents=True, exist_ok=True)
    base, rloop, dapo = ROOT / "base", ROOT / "rloop", ROOT / "dapo"
    columns = (TextColumn("{task.description:28}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[note]}"), console=Console()) as view:
        with stopwatch:
            run_together(view, [train("quickstart_base", "base model (SFT)")])
        with stopwatch:
            run_together(view, [train("quickstart", "RLoop, 3 iterations"), train("quickstart_dapo", "plain DAPO")])
        chosen = _checkpoints(base, rloop, dapo)
        jobs = [
            evaluation(name, run, checkpoint)
            for name, (_, run, checkpoint) in chosen.items()
            if not _is_measured(name, run, checkpoint)
        ]
        for first in range(0, len(jobs), 2):
            with stopwatch:
                run_together(view, jobs[first : first + 2])
    results = _results(chosen)
    results["seconds"] = stopwatch.seconds
    write_atomic(ROOT / "results.json", json.dumps(results, indent=1) + "\n")
    table = _labelled(results, chosen)
    runs = [rloop, dapo, base]
    write_report(runs, ROOT / "report.html", table, [words_of(run) for run in runs])
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(to_rich(results_table(table)))
    console.print(f"{results['seconds']:.0f} s; table: {ROOT}/results.json; plots: open {ROOT}/report.html")


def _checkpoints(base: Path, rloop: Path, dapo: Path) -> dict[str, tuple[str, Path, Evaluation]]:
    """Row name: (label, run, checkpoint). The first three are the arms."""
    runs = {path: read_run(path).evaluations for path in (base, rloop, dapo)}
    wanted = {
        "base": ("Base", base, pick(runs[base])),
        "dapo": ("DAPO", dapo, pick(runs[dapo])),
        "rloop": ("RLoop", rloop, pick(runs[rloop])),
        "rloop_last_theta": ("RLoop, last θ", rloop, last_theta(runs[rloop])),
        "rloop_last_rl": ("RLoop, last RL policy", rloop, last_rl_policy(runs[rloop])),
        "dapo_last_rl": ("DAPO, last RL policy", dapo, last_rl_policy(runs[dapo])),
    }
    return {name: (label, run, found) for name, (label, run, found) in wanted.items() if found is not None}


def _results(chosen: dict[str, tuple[str, Path, Evaluation]]) -> dict[str, Any]:
    """`results.json`: the arms' metrics by name, the other checkpoints below them, and which checkpoint each row is."""
    measured = {name: json.loads(_held_out(name).read_text())["metrics"] for name in chosen}
    rows = {name: {column: metrics[column] for column in COLUMNS} for name, metrics in measured.items()}
    arms = {name: rows.pop(name) for name in ("base", "dapo", "rloop")}
    return {"arms": arms, "others": rows, "checkpoints": {name: found.name for name, (_, _, found) in chosen.items()}}


def _labelled(results: dict[str, Any], chosen: dict[str, tuple[str, Path, Evaluation]]) -> dict[str, Any]:
    """The results as the table wants them: each row with its label and checkpoint."""
    return {
        group: {
            name: {**row, "label": chosen[name][0], "checkpoint": chosen[name][2].name}
            for name, row in results[group].items()
        }
        for group in ("arms", "others")
    }


if __name__ == "__main__":
    main()
