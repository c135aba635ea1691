"""The main job of `make quickstart`: base model, RLoop and plain DAPO side by side, held-out evaluation, report.

Everything is a run or an evaluation of the `rloop` command, each in a process of its own; this file only chains them
and shows how far they are. Stopped at any point, the same command goes on.
"""

from __future__ import annotations

import json
import os
import sys
import time
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from jobs import Job, progress_view, run_together, training
from rich.console import Console

from rloop_mcore.analysis.pick import last_rl_policy, last_theta, pick
from rloop_mcore.analysis.read_run import Evaluation, read_run
from rloop_mcore.analysis.report import write_report
from rloop_mcore.analysis.table import results_table, to_rich
from rloop_mcore.main.report import words_of
from rloop_mcore.platform.files import write_atomic

ROOT = Path("runs/quickstart")
HELD_OUT = "countdown:test"
HELD_OUT_PROBLEMS = 200
COLUMNS = ("avg@32", "pass@8", "pass@16", "pass@32")  # of the paper's Table 1


def train(experiment: str, title: str) -> Job:
    """A training run by its experiment file."""
    return training(title, [f"experiment={experiment}"], ROOT / "logs" / f"{experiment}.log")


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
    ArgumentParser(description=__doc__).parse_args()  # there are none, and --help starts nothing
    stopwatch = Stopwatch(ROOT / "seconds.json")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    (ROOT / "held_out").mkdir(parents=True, exist_ok=True)
    base, rloop, dapo = ROOT / "base", ROOT / "rloop", ROOT / "dapo"
    with progress_view() as view:
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
