"""What the tests do with a job's script: check it, read its directives, run it with stand-ins for Slurm's programs."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path


def directives(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


def check(script: str, path: Path) -> None:
    path.write_text(script)
    parsed = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert parsed.returncode == 0, parsed.stderr
    if shutil.which("shellcheck"):
        found = subprocess.run(["shellcheck", "--severity=style", str(path)], capture_output=True, text=True)
        assert found.returncode == 0, found.stdout


def run_body(script: str, folder: Path, programs: dict[str, str], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script with stand-ins for Slurm's programs."""
    places = folder / "bin"
    places.mkdir(exist_ok=True)
    for name, text in programs.items():
        (places / name).write_text(f"#!/bin/bash\n{text}\n")
        (places / name).chmod(0o755)
    environment = {"PATH": f"{places}:/usr/bin:/bin", "SLURM_JOB_ID": "7", **variables}
    return subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=60, env=environment, cwd=folder
    )
