"""Run a script under torchrun in the ranks of a test: `python ranks.py PROCESSES SCRIPT ARGUMENTS`.

Megatron is imported once and torchrun forks the ranks: each would spend more on its imports than on the tests.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def launch(script: Path, *arguments: str | Path, processes: int, timeout_s: float = 400.0) -> str:
    """The standard output of all ranks; fails where one does. A single process runs without torchrun."""
    given = [str(argument) for argument in arguments]
    command = [sys.executable, *([__file__, str(processes)] if processes > 1 else []), str(script), *given]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-30000:]
    return done.stdout


def main(processes: int, *command: str) -> None:
    from rloop_mcore import platform
    from rloop_mcore.platform.process import importing
    from rloop_mcore.platform.torchrun import BACKEND

    platform.setup("cpu", 1)
    with importing():
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        import rloop_mcore.main.rooms  # noqa: F401  all that a rank of a run has
    torchrun = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="test",
        rdzv_backend=BACKEND,
        rdzv_endpoint="127.0.0.1:0",
        rdzv_configs={"rank": 0},
        max_restarts=0,
        monitor_interval=0.1,
        start_method="fork",
    )
    elastic_launch(torchrun, run)(os.getpid(), *command)


def run(parent: int, script: str, *arguments: str) -> None:
    """One rank."""
    from rloop_mcore.platform.process import die_with_parent

    die_with_parent(parent)
    sys.argv, sys.path[0] = [script, *arguments], str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
