"""What listens while torchrun's ranks run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil

RANK = """
import os, time
from datetime import timedelta
import torch
import torch.distributed as dist
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
value = torch.ones(1)
dist.all_reduce(value)
os.write(1, f"rank {dist.get_rank()} of {int(value)}\\n".encode())  # at once: both ranks write to one pipe
time.sleep(600)
"""


def test_nothing_listens_where_others_could_reach_it(tmp_path: Path) -> None:
    """torchrun unpickles what it finds in a store of its own making, and that asks for no key."""
    rank = tmp_path / "rank.py"
    rank.write_text(RANK)
    command = [sys.executable, "-m", "rloop_mcore.platform.torchrun", "--nproc-per-node", "2", str(rank)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            said = {process.stdout.readline() for _ in range(2)}
            everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            listening = [c.laddr.ip for each in everyone for c in each.net_connections() if c.status == "LISTEN"]
        finally:
            process.terminate()
    assert said == {"rank 0 of 2\n", "rank 1 of 2\n"}
    assert set(listening) == {"127.0.0.1"}
