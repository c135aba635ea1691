"""`rloop status`: the best checkpoint so far and why a run stopped, from its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rloop_mcore.compose import load_config, to_yaml
from rloop_mcore.journal import Journal
from rloop_mcore.main.run_directory import RunDirectory
from rloop_mcore.main.status import status


def test_the_best_checkpoint_and_the_last_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDirectory(tmp_path)
    run.config.write_text(to_yaml(load_config([f"run.dir={tmp_path}", "model.path=m", "data.train=d"])))
    status(tmp_path, as_json=True)
    empty = json.loads(capsys.readouterr().out)
    assert (empty["best"], empty["message"]) == (None, None)

    journal = Journal(run.journal)
    for name, average in [("i0_explore_000020", 0.2), ("i0_explore_000040", 0.3), ("i0_explore_000060", 0.1)]:
        journal.record("measured", name=name, path=f"policies/{name}", digest=name, metrics={"avg@32": average})
    journal.record("removed", paths=["policies/i0_explore_000020"])
    run.write_ending(75, "stopped: SIGTERM came; the same command goes on from here")
    status(tmp_path, as_json=True)
    state = json.loads(capsys.readouterr().out)
    name = "i0_explore_000040"
    assert state["best"] == {"name": name, "path": f"{tmp_path}/policies/{name}", "avg@32": 0.3}
    assert state["message"] == "stopped: SIGTERM came; the same command goes on from here"
    status(tmp_path, as_json=False)
    assert name in capsys.readouterr().out
