import json
from importlib.metadata import version
from pathlib import Path

import pytest

from rloop_mcore.journal import Journal
from rloop_mcore.main.run_directory import RunDirectory
from rloop_mcore.main.start_record import start_record


def test_a_start_knows_how_the_process_before_ended(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.clear_ending()
    assert start_record(run, "CPU")["previous"] is None
    run.write_ending(75, "stopped: SIGTERM came")
    run.clear_ending()
    assert run.ending() is None
    assert start_record(run, "CPU")["previous"] == {"code": 75, "message": "stopped: SIGTERM came"}
    run.clear_ending()  # a process that was killed has left no ending
    assert start_record(run, "CPU")["previous"] is None


def test_it_names_the_job_and_the_software(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    fields = json.loads(json.dumps(start_record(RunDirectory(tmp_path), "H100")))
    assert (fields["job"], fields["restarts"]) == ("41", 2)
    assert fields["environment"]["device"] == "H100"
    assert fields["environment"]["packages"]["torch"] == version("torch")
    Journal(tmp_path / "journal.jsonl").record("started", **fields)  # it takes them
