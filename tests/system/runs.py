"""Real runs for the system tests: started as a user would, watched through their journal, killed by signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from rloop_mcore.journal import Journal
from rloop_mcore.main.run_directory import RunDirectory
from rloop_mcore.main.status import read_status

ROOT = Path(__file__).parents[2]
DEADLINE_S = 240.0
REPLACED = ("engine", "reward")  # roles: with another such process the run goes on


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "rloop_mcore.main.cli", *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def rloop(*arguments: str, timeout: float = DEADLINE_S) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=environment()
    )


def start(run_dir: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """Start a tiny run in the background; its output goes to `run_dir.log`."""
    with open(f"{run_dir}.log", "ab") as log:
        return subprocess.Popen(
            command("train", "experiment=tiny", f"run.dir={run_dir}", *overrides),
            stdout=log,
            stderr=log,
            cwd=ROOT,
            env=environment(),
        )


def finish(process: subprocess.Popen[bytes], run_dir: Path) -> None:
    """Wait for a run to end well."""
    code = process.wait(DEADLINE_S)
    assert code == 0, f"exit code {code}:\n{Path(f'{run_dir}.log').read_text()[-3000:]}"


def status(run_dir: Path) -> dict[str, Any]:
    """What `rloop status --json` prints."""
    return read_status(RunDirectory(run_dir))


def records(run_dir: Path) -> list[dict[str, Any]]:
    return Journal(run_dir / "journal.jsonl").records


def wait_for(what: str, condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Poll until the condition holds. Fails when the run ends first, or takes too long."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert process.poll() is None, f"the run ended with {process.returncode} before {what}"
        assert time.monotonic() < deadline, f"waited {DEADLINE_S} s for {what}"
        time.sleep(0.1)


def tree(process: subprocess.Popen[bytes]) -> dict[str, psutil.Process]:
    """The processes of a run by role: supervisor, torchrun, rank, engine, reward."""
    roles = {"supervisor": psutil.Process(process.pid)}
    for child in roles["supervisor"].children(recursive=True):
        try:
            words = " ".join(child.cmdline())
        except psutil.NoSuchProcess:  # it ended meanwhile, as helpers of the compiler and reward workers do
            continue
        for role, mark in (
            ("torchrun", "rloop_mcore.platform.torchrun"),
            ("rank", "rloop_mcore.main.worker"),
            ("engine", "rloop_mcore.rollout.embedded"),
            ("reward", "rloop_mcore.reward"),
        ):
            if mark in words and role not in roles:
                roles[role] = child
                break
    return roles


def kill(process: subprocess.Popen[bytes], role: str) -> list[psutil.Process]:
    """SIGKILL one role, or `all`; returns every process of the run. They have ended then, unless it is replaced."""
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    victims = everyone if role == "all" else [tree(process)[role]]
    for victim in victims:
        with suppress(psutil.NoSuchProcess):  # it ended meanwhile, by itself or with its parent
            victim.send_signal(signal.SIGKILL)
    if role not in REPLACED:
        process.wait(60)  # first, by what keeps its exit code
        _, alive = psutil.wait_procs(everyone, timeout=60)
        assert not alive, f"killing {role} left {alive}"
    return everyone
