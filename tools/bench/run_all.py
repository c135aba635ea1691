"""Run every benchmark of this folder, one after another, and print one table of their ratios."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import rollout
from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).parent
PARTS = tuple(f"{part}.py" for part in rollout.PARTS)  # rollout.py runs them
NO_BENCHMARKS = (
    "cache_queries.py",
    "common.py",
    "even_rewards.py",
    "run_all.py",
    "simulated_fleet.py",
    "sync_ranks.py",
    "trl_step.py",
    *PARTS,
)
MISSING = 77  # exit code of a benchmark whose baseline or GPU is not here; it has said so
DEADLINE_S = 1800


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats and smaller models")
    options = parser.parse_args()
    table = Table(title="Benchmarks: ratios against a baseline run side by side", title_justify="left")
    for heading in ("benchmark", "metric", "value", "goal", "", "baseline"):
        table.add_column(heading)
    for script in sorted(FOLDER.glob("*.py")):
        if script.name in NO_BENCHMARKS:
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "result.json"
            command = [sys.executable, str(script), "--json", str(out), *(["--quick"] if options.quick else [])]
            try:
                done = subprocess.run(command, timeout=DEADLINE_S)
            except subprocess.TimeoutExpired:
                table.add_row(script.stem, f"took more than {DEADLINE_S} s")
                continue
            if done.returncode == MISSING:
                table.add_row(script.stem, "skipped: what it needs is not here, see above")
                continue
            done.check_returncode()
            result = json.loads(out.read_text(encoding="utf-8"))
        for metric in result["metrics"]:
            verdict = "met" if metric["met"] else "MISSED"
            value = f"{metric['value']} {metric['unit']}"
            table.add_row(result["name"], metric["name"], value, metric["goal"], verdict, metric["baseline"])
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
