"""The ranks of one node: torchrun, started so that they end with it and it with its supervisor."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rloop_mcore.main.run_directory import SUPERVISOR_VARIABLE
from rloop_mcore.platform.network import interface_of
from rloop_mcore.platform.process import OWN_PATH, die_with_parent

SCHEDULERS = (signal.SIGUSR1, signal.SIGUSR2)  # what Slurm's --signal sends

# torchrun's report of the rank of this node that fell first
_ROOT_CAUSE = re.compile(r"Root Cause.*?rank\s*:\s*(\d+).*?exitcode\s*:\s*(-?\d+)", re.DOTALL)


@dataclass(frozen=True)
class Rendezvous:
    """Where this node's ranks stand among the job's, and where they meet: on this host alone, or at the first node."""

    ranks: int
    node: int = 0
    nodes: int = 1
    address: str = "127.0.0.1"  # own
    head: str = "127.0.0.1"
    port: int = 0

    def options(self) -> list[str]:
        """The options of `platform/torchrun.py`."""
        endpoint = f"{self.head}:{self.port}"
        return ["--nnodes", str(self.nodes), "--rdzv-conf", f"rank={self.node}", "--rdzv-endpoint", endpoint]

    def environment(self) -> dict[str, str]:
        """The interface by which the nodes reach each other: loopback where there is but one."""
        interface = interface_of(self.address)
        return {"GLOO_SOCKET_IFNAME": interface} | ({"NCCL_SOCKET_IFNAME": interface} if self.nodes > 1 else {})


def start_ranks(run: Path, rendezvous: Rendezvous, log: Path) -> subprocess.Popen[bytes]:
    """Start torchrun with `rendezvous.ranks` ranks of the run; what it says goes to `log`."""
    supervisor = os.getpid()
    command = [
        *(sys.executable, "-m", "rloop_mcore.platform.torchrun", *rendezvous.options()),
        *("--nproc-per-node", str(rendezvous.ranks), "-m", "rloop_mcore.main.worker", str(run)),
    ]
    with open(log, "ab") as file:
        # a session of its own: Ctrl-C reaches only the supervisor, which asks the run to stop at a step's end
        return subprocess.Popen(
            command,
            stderr=file,
            start_new_session=True,
            env={**os.environ, **OWN_PATH, **rendezvous.environment(), SUPERVISOR_VARIABLE: str(supervisor)},
            preexec_fn=lambda: work_for(supervisor),
        )


def first_failure(log: Path) -> dict[str, Any] | None:
    """Rank and exit code (negative: a signal) of the first rank of torchrun's `log` to fall; None: none did."""
    reports = _ROOT_CAUSE.findall(log.read_text(errors="replace")) if log.exists() else []
    return {"rank": int(reports[-1][0]), "code": int(reports[-1][1])} if reports else None


def work_for(supervisor: int) -> None:
    """Called first in a child. Slurm signals every process of a job's step; only the supervisor is to heed it."""
    for number in SCHEDULERS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(supervisor)
