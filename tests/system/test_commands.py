"""The commands as a user types them: mistakes get one sentence and exit code 2; what works, works at every layout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import runs

from rloop_mcore.data.countdown_model import write_model
from rloop_mcore.trajectory.cache import TrajectoryCache

pytestmark = pytest.mark.system


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["status", "/nowhere"], "/nowhere is not a run directory"),
        (["report", "/nowhere"], "/nowhere is not a run directory"),
        (["report", "/nowhere", "--live"], "/nowhere is not a run directory"),
        (["report", "/nowhere", "--live", "--out", "page.html"], "--live serves the page and writes no file"),
        (["report", "/nowhere", "--port", "8000"], "--port 8000 is of --live"),
        (["compare", "/nowhere", "/nowhere"], "/nowhere is not a run directory"),
        (["evaluate", "--policy", "/nowhere", "--data", "countdown:test"], "--policy /nowhere holds no config.json"),
        (["evaluate", "--policy", "/nowhere", "--step", "last", "--data", "x"], "/nowhere is not a run directory"),
        (
            ["evaluate", "--policy", "/nowhere", "--data", "x", "--against", "/none.json"],
            "--against /none.json cannot be",
        ),
        (["grade", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["train", "experiment=tiny", "run.dir=/proc/x"], "run.dir=/proc/x cannot be created"),
        (["train", "experiment=tiny", "algorithm.rl_step=3"], "did you mean algorithm.rl_steps?"),
        (["train", "experiment=tiny", "data.train=countdown:all"], "countdown has the splits"),
        (["train", "experiment=tiny", "data.template=none"], "data.template 'none' not found"),
        (["train", "experiment=tiny", "layout.tp=3"], "layout.tp=3 does not divide"),
        (["train", "experiment=tiny", "layout.dp=100000"], "layout.* starts 100000 ranks on this machine"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments: list[str], words: str, tmp_path: Path) -> None:
    if arguments[0] == "train" and not any(word.startswith("run.dir") for word in arguments):
        arguments = [*arguments, f"run.dir={tmp_path / 'run'}"]
    done = runs.rloop(*arguments)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr


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


@pytest.mark.timeout(400)
def test_a_whole_iteration_runs_on_two_replicas(tmp_path: Path) -> None:
    """The mismatch gate (1e-4 against the engine) holds the policy and its export to the truth; at tp=2 it does so in
    test_evaluate_resume.py, at pp=2 in test_guarded_run.py."""
    short = ["algorithm.iterations=1", "algorithm.rl_steps=2", "sft.limit=5120", "evaluation.every=0"]
    process = runs.start(tmp_path / "run", "layout.dp=2", "checkpoint.every=20", *short)
    runs.finish(process, tmp_path / "run")
    state = runs.status(tmp_path / "run")
    assert state["state"] == "finished"
    assert state["cache"]["trajectories"] >= 2 * 24 * 16


def test_evaluate_names_the_golds_that_only_their_own_spelling_matches(tmp_path: Path) -> None:
    write_model(tmp_path / "model", seed=0)
    golds = {"good": r"\frac{1}{2}", "odd": r"\frac{1}{"}
    rows = [{"id": name, "problem": "5+5", "answer": gold} for name, gold in golds.items()]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "result.json"
    done = runs.rloop(
        *("evaluate", "--policy", str(tmp_path / "model"), "--data", str(tmp_path / "two.jsonl"), "--samples", "2"),
        *("--k", "1", "--json", str(out), "--out", str(tmp_path / "kept"), "experiment=tiny", "reward.verifier=math"),
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["bad_golds"] == 1
    assert "1 of 2 gold answers of two don't verify against themselves" in done.stdout + done.stderr
    assert "odd (unparsable)" in done.stdout + done.stderr
    assert "good (" not in done.stdout + done.stderr


def test_evaluate_writes_what_it_prints(tmp_path: Path) -> None:
    write_model(tmp_path / "model", seed=0)
    out = tmp_path / "result.json"
    done = runs.rloop(
        *("evaluate", "--policy", str(tmp_path / "model"), "--data", "countdown:validation", "--samples", "4"),
        *("--k", "1,4", "--json", str(out), "--out", str(tmp_path), "experiment=tiny", "evaluation.limit=5"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert set(result["metrics"]) == {"avg@4", "pass@1", "pass@4", "maj@4"}
    assert result["problems"] == 5
    assert "countdown-validation: the first 5 of 200 problems, by evaluation.limit=5" in done.stdout
    assert sum(result["reasons"].values()) == 20
    assert "pass@4" in done.stdout
