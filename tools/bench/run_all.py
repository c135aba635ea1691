"""Run every benchmark of this folder, one after another, and print one table of their ratios."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).parent
BENCHMARKS = ("actor", "analysis", "cache", "convert", "gpu_actor", "gpu_loop", "reward", "rollout", "step_vs_trl")
MISSING = 77  # exit code of a benchmark whose baseline or GPU is not here; it has said so
DEADLINE_S = 1800


def main() -> int:
    """Exit code 1 where a benchmark failed; the table has the others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats and smaller models")
    options = parser.parse_args()
    table = Table(title="Benchmarks: ratios against a baseline run side by side", title_justify="left")
    for heading in ("benchmark", "metric", "value", "goal", "", "baseline"):
        table.add_column(heading)
    failed = False
    for name in BENCHMARKS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "result.json"
            command = [sys.executable, str(FOLDER / f"{name}.py"), "--json", str(out)]
            command += ["--quick"] if options.quick else []
            try:
                code = subprocess.run(command, timeout=DEADLINE_S).returncode
                words = f"failed with exit code {code}, see above"
            except subprocess.TimeoutExpired:
                code, words = 1, f"took more than {DEADLINE_S} s"
            if code:
                table.add_row(name, words if code != MISSING else "skipped: what it needs is not here, see above")
                failed = failed or code != MISSING
                continue
            metrics = json.loads(out.read_text(encoding="utf-8"))["metrics"]
        for metric in metrics:
            verdict = "met" if metric["met"] else "MISSED"
            value = f"{metric['value']} {metric['unit']}"
            table.add_row(name, metric["name"], value, metric["goal"], verdict, metric["baseline"])
    Console(width=140).print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
