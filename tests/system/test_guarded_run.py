"""A run whose every RL update is skipped ends its explorations early and goes on from there."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs

pytestmark = pytest.mark.system


@pytest.mark.timeout(300)
def test_explorations_that_the_guard_ends_leave_the_weights_and_are_fine_tuned_on(tmp_path: Path) -> None:
    """One step off, so that the engines work on the next batch when a phase ends; over two pipeline stages."""
    run = tmp_path / "run"
    guard = ["optimizer.skip_grad=1e-9", "guard.patience=2", "guard.policy=end_phase"]
    short = ["data.validation=null", "evaluation.every=0", "rollout.max_lag=1", "checkpoint.every=20"]
    runs.finish(runs.start(run, "layout.pp=2", *guard, *short), run)
    state = runs.status(run)
    assert state["state"] == "finished"
    assert [(r["iteration"], r["phase"], r["step"]) for r in state["guard"]] == [(0, "explore", 2), (1, "explore", 2)]
    assert "2 of 2 updates skipped" in state["guard"][0]["reason"]
    digests = {r["name"]: r["digest"] for r in runs.records(run) if r["event"] == "measured"}
    assert digests["i0_explore_000002"] == digests["base"] != digests["i0_exploit_000000"]
    assert digests["i1_explore_000002"] == digests["i0_exploit_000000"]
    assert all(state["expert"])
    assert state["metrics"]["global_step"] == 4
