"""Run a script in the ranks of a test: `python ranks.py PROCESSES SCRIPT ARGUMENTS`.

Megatron is imported once and the ranks are forked; torchrun's would spend more on their imports than on the tests.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]


def launch(script: Path, *arguments: str | Path, processes: int, timeout_s: float = 400.0) -> str:
    """The standard output of all ranks; fails where one does. A single process gets no torchrun's variables."""
    given = [str(argument) for argument in arguments]
    command = [sys.executable, *([__file__, str(processes)] if processes > 1 else []), str(script), *given]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-30000:]
    return done.stdout


def main(processes: int, script: str) -> None:
    from rloop_mcore import platform
    from rloop_mcore.platform.process import die_with_parent, importing

    platform.setup("cpu", 1)
    with importing():
        import torch.distributed as dist

        import rloop_mcore.main.rooms  # noqa: F401  all that a rank of a run has
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    parent, ranks = os.getpid(), set()
    for rank in range(processes):
        if (pid := os.fork()) == 0:
            die_with_parent(parent)
            os.environ |= torchrun_variables(rank, processes, store.port)
            sys.argv, sys.path[0] = sys.argv[2:], str(Path(script).parent)
            runpy.run_path(script, run_name="__main__")
            return
        ranks.add(pid)
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        if status:
            for other in ranks:
                with suppress(ProcessLookupError):
                    os.kill(other, signal.SIGKILL)
            sys.exit(f"a rank ended with {os.waitstatus_to_exitcode(status)}")


def torchrun_variables(rank: int, world: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is there: rank 0 opens none
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
