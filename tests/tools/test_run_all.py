"""What `make bench` runs, and what it shows where something fails."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "tools" / "bench"
sys.path.append(str(BENCH))

import rollout  # noqa: E402
import run_all  # noqa: E402

METRIC = '{"name": "speed", "value": 2.0, "unit": "x", "goal": ">= 1", "baseline": "a loop", "met": true}'


def test_what_reports_is_run_and_nothing_else() -> None:
    """hostile_answers.py, which reward.py imports, was run too, and what it doesn't write was read: no table."""
    reporting = {path.stem for path in BENCH.glob("*.py") if "options.json" in path.read_text(encoding="utf-8")}
    assert reporting == {*run_all.BENCHMARKS, *rollout.PARTS}


def test_a_benchmark_that_fails_takes_no_other_from_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.py").write_text(f"import sys\nopen(sys.argv[2], 'w').write('{{\"metrics\": [{METRIC}]}}')")
    (tmp_path / "broken.py").write_text("raise SystemExit(3)")
    (tmp_path / "absent.py").write_text(f"raise SystemExit({run_all.MISSING})")
    (tmp_path / "endless.py").write_text("import time\ntime.sleep(600)")
    for name, value in (
        ("FOLDER", tmp_path),
        ("BENCHMARKS", ("broken", "endless", "absent", "good")),
        ("DEADLINE_S", 10),
    ):
        monkeypatch.setattr(run_all, name, value)
    monkeypatch.setattr(sys, "argv", ["run_all.py"])
    assert run_all.main() == 1
    table = capsys.readouterr().out
    for words in ("failed with exit code 3", "took more than 10 s", "skipped", "speed", "a loop"):
        assert words in table
    monkeypatch.setattr(run_all, "BENCHMARKS", ("absent", "good"))
    assert run_all.main() == 0
