"""`rloop` commands as jobs of a longer work: each a process of its own, with a log and a bar in the progress view."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rloop_mcore.compose import load_config
from rloop_mcore.main.run_directory import log_tail
from rloop_mcore.platform.files import read_json_lines
from rloop_mcore.platform.process import die_with_parent
from rloop_mcore.progress import left_text, plain_line, seconds_left

DEADLINE_S = 3600.0  # of jobs that run together
PLAIN_EVERY_S = 30.0  # lines where there is no terminal to draw bars on


def progress_view() -> Progress:
    """Bars for `run_together`."""
    columns = (TextColumn("{task.description:28}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    times = (TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    return Progress(*columns, *times, TextColumn("{task.fields[note]}"), console=Console(soft_wrap=True))


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
            raise SystemExit(f"{self.title} ended with exit code {code}; the end of {self.log}:\n{log_tail(self.log)}")
        return code == 0

    def progress(self) -> tuple[int, str]:
        """Steps done, and a figure or two of the last one."""
        if self.run is None:
            return 0, ""
        lines = read_json_lines(self.run / "metrics.jsonl")
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
    begun = told = time.monotonic()
    deadline = begun + DEADLINE_S
    while bars:
        if time.monotonic() > deadline:
            raise SystemExit(f"{', '.join(job.title for job in bars.values())}: not done in {DEADLINE_S:.0f} s")
        for bar, job in list(bars.items()):
            steps, note = job.progress()
            view.update(bar, completed=min(steps, job.total), note=note)
            if job.done():
                view.update(bar, completed=job.total, note="done")
                view.stop_task(bar)
                del bars[bar]
        if not view.console.is_terminal and time.monotonic() - told > PLAIN_EVERY_S:
            told = time.monotonic()
            for line in _lines(view, bars, told - begun):
                view.console.print(line)
        time.sleep(0.5)


def _lines(view: Progress, bars: Container[TaskID], elapsed_s: float) -> Iterator[str]:
    """What the bars would show of the jobs that are at work."""
    for task in view.tasks:
        if task.id in bars:
            done, total = int(task.completed), int(task.total or 0)
            left = left_text(seconds_left(elapsed_s, done, total - done))
            yield plain_line(task.description, done, total, task.fields["note"], left)


def training(title: str, overrides: Sequence[str], log: Path) -> Job:
    """A training run. Its bar counts RL steps, or the updates of SFT where there are none."""
    config = load_config(list(overrides))
    steps = config.algorithm.iterations * config.algorithm.rl_steps
    if steps == 0:
        assert config.sft.limit is not None
        steps = config.sft.epochs * config.sft.limit // config.sft.batch_size
    return Job(title, ["train", *overrides, "tracking.progress=false"], log, Path(config.run.dir), steps)
