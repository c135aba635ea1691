"""The rollout's benchmarks in one run: the engine, the weight sync, the controller, and one step off.

Each has a process of its own (the trainer's needs a process group, the engine's all cores) and can be run alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from common import Metric, arguments, report

PARTS = ("engine", "sync", "controller", "one_step_off")
DEADLINE_S = 1200


def main() -> None:
    options = arguments(__doc__ or "")
    metrics = []
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            out = Path(folder) / f"{part}.json"
            command = [sys.executable, str(Path(__file__).with_name(f"{part}.py")), "--json", str(out)]
            subprocess.run([*command, *(["--quick"] if options.quick else [])], check=True, timeout=DEADLINE_S)
            metrics += [Metric(**metric) for metric in json.loads(out.read_text(encoding="utf-8"))["metrics"]]
    print()
    report("rollout", metrics, options.json)


if __name__ == "__main__":
    main()
