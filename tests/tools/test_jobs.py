"""The work of tools/quickstart.py and tools/study.py as a person sees it who has no terminal."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))

import jobs  # noqa: E402


def test_without_a_terminal_there_are_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "PLAIN_EVERY_S", 0.0)
    console = Console(file=io.StringIO(), soft_wrap=True)
    monkeypatch.setattr(jobs, "Console", lambda **_: console)
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"phase": "sft", "step": 3, "global_step": 3, "loss": 1.25}\n')
    job = jobs.Job("a run", ["--help"], tmp_path / "log", run, total=12)
    monkeypatch.setattr(jobs.time, "sleep", lambda _: None)
    with jobs.progress_view() as view:
        jobs.run_together(view, [job])
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert any("a run  3/12  loss 1.25" in line and line.endswith(" left") for line in lines), lines
    assert "12/12" in lines[-1]
