"""The long mode of test_kill.py: RLOOP_KILLS random kills of random processes, and the run ends as if undisturbed."""

from __future__ import annotations

import os
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import runs

pytestmark = pytest.mark.system

KILLS = int(os.environ.get("RLOOP_KILLS", "0"))
ROLES = ("all", "supervisor", "torchrun", "rank", "engine", "reward")


@pytest.mark.skipif(not KILLS, reason="long: RLOOP_KILLS=100 asks for it")
@pytest.mark.timeout(max(1, KILLS) * 180)
def test_random_kills_leave_no_trace(tmp_path: Path) -> None:
    """Runs are started anew, in new directories, until so many kills are done; each must end as the undisturbed one."""
    undisturbed = tmp_path / "undisturbed"
    runs.finish(runs.start(undisturbed), undisturbed)
    expected = runs.status(undisturbed)
    draw, kills, number = random.Random(int(os.environ.get("RLOOP_SEED", "0"))), 0, 0
    while kills < KILLS:
        run_dir = tmp_path / f"run{number}"
        process = runs.start(run_dir)
        while kills < KILLS and (role := killed_in_time(process, run_dir, draw)):
            kills += 1
            print(f"kill {kills}: {role} of run {number}, {place(runs.records(run_dir))}", flush=True)
            if role not in runs.REPLACED:
                process = runs.start(run_dir)
        runs.finish(process, run_dir)
        found = runs.status(run_dir)
        for key in ("state", "policy_digest", "base_digest", "cache", "expert"):
            assert found[key] == expected[key], f"run {number}: {key}"
        print(f"run {number}: as undisturbed", flush=True)
        number += 1


def place(records: list[dict[str, Any]]) -> str:
    last = records[-1] if records else {}
    words = [f"{key} {last[key]}" for key in ("iteration", "phase", "step") if key in last]
    return f"journal at record {len(records)} ({' '.join(words)})"


def killed_in_time(process: subprocess.Popen[bytes], run_dir: Path, draw: random.Random) -> str:
    """Kill a role (everything, where it is not there), and say which; "" where the run ended before.

    One kill in five hits a start, the others up to eight seconds of work.
    """
    role = draw.choice(ROLES)
    records, starting, seconds = len(runs.records(run_dir)), draw.random() < 0.2, draw.uniform(0.0, 8.0)
    while not starting and len(runs.records(run_dir)) == records and process.poll() is None:
        time.sleep(0.1)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    if process.poll() is not None:
        return ""
    role = role if role in runs.tree(process) else "all"
    runs.kill(process, role)
    return role
