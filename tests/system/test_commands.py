"""The commands as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import runs

from rloop_mcore.data.countdown_model import write_model
from rloop_mcore.trajectory.cache import TrajectoryCache

pytestmark = pytest.mark.system


@pytest.mark.timeout(400)
def test_of_the_working_directory_only_the_verifier_is_taken(tmp_path: Path) -> None:
    """As the installed `rloop` runs. The files named like what the processes import would end them."""
    for name in ("json", "sympy", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not this one')\n")
    (tmp_path / "anything.py").write_text("def right(*_):\n    return True, 'correct'\n")
    done = subprocess.run(
        [
            *(Path(sys.executable).with_name("rloop"), "train", "experiment=tiny", "run.dir=run"),
            *("reward.verifier=anything:right", "sft.limit=128", "algorithm.iterations=1", "algorithm.rl_steps=1"),
            *("algorithm.sampling_rounds=1", "data.validation=null", "evaluation.every=0"),
        ],
        cwd=tmp_path,
        env={**runs.environment(), "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=runs.DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
    samples = list(TrajectoryCache(tmp_path / "run/cache").rows())
    assert samples
    assert all(row.correct for row in samples)


def test_a_verifier_that_cannot_be_loaded_stops_the_run_with_exit_code_2(tmp_path: Path) -> None:
    done = runs.rloop("train", "experiment=tiny", f"run.dir={tmp_path}", "reward.verifier=no.such:thing")
    assert done.returncode == 2
    assert "no.such" in done.stderr
    assert not (tmp_path / "ranks.log").exists(), "it was to show before anything is started"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The result of an evaluation on two of three problems, and what it said."""
    folder = tmp_path_factory.mktemp("evaluated")
    write_model(folder / "model", seed=0)
    golds = {"good": r"\frac{1}{2}", "odd": r"\frac{1}{", "third": "3"}
    rows = [{"id": name, "problem": "5+5", "answer": gold} for name, gold in golds.items()]
    (folder / "three.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = runs.rloop(
        *("evaluate", "--policy", str(folder / "model"), "--data", str(folder / "three.jsonl"), "--samples", "4"),
        *("--k", "1,4", "--json", str(folder / "result.json"), "--out", str(folder / "kept")),
        *("experiment=tiny", "reward.verifier=math", "evaluation.limit=2"),
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "result.json").read_text()), done.stdout + done.stderr


def test_evaluate_names_the_golds_that_only_their_own_spelling_matches(evaluated: tuple[dict[str, Any], str]) -> None:
    result, said = evaluated
    assert result["bad_golds"] == 1
    assert "1 of 2 gold answers of three don't verify against themselves" in said
    assert "odd (unparsable)" in said
    assert "good (" not in said


def test_evaluate_writes_what_it_prints(evaluated: tuple[dict[str, Any], str]) -> None:
    result, said = evaluated
    assert set(result["metrics"]) == {"avg@4", "pass@1", "pass@4", "maj@4"}
    assert result["problems"] == 2
    assert "three: the first 2 of 3 problems, by evaluation.limit=2" in said
    assert sum(result["reasons"].values()) == 8
    assert "pass@4" in said
