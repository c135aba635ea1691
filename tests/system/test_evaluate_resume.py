"""`rloop evaluate` killed with SIGKILL in its middle, resumed, grown; of any checkpoint of a real run."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import runs

from rloop_mcore.data.countdown_model import write_model
from rloop_mcore.trajectory.cache import TrajectoryCache

pytestmark = pytest.mark.system

_DIFFER = ("seconds", "samples")  # where, and how long it took


def command(policy: Path, out: Path, samples: int, *more: str) -> list[str]:
    """Batches of 8 responses; what is drawn and found depends on none of that."""
    return [
        *("evaluate", "--policy", str(policy), "--data", "countdown3:validation", "--samples", str(samples)),
        *("--k", "1,4,8", "--out", str(out), "--json", f"{out}.json", *more),
        *("experiment=tiny", "evaluation.limit=12", "rollout.max_running=4"),
    ]


def result(out: Path) -> dict[str, Any]:
    return json.loads(Path(f"{out}.json").read_text())


def numbers(out: Path) -> dict[str, Any]:
    return {key: value for key, value in result(out).items() if key not in _DIFFER}


def kept(out: Path) -> TrajectoryCache:
    (manifest,) = out.glob("countdown3-validation-*/samples/manifest.json")
    return TrajectoryCache(manifest.parent)


def evaluate(policy: Path, out: Path, samples: int, *more: str) -> None:
    done = runs.rloop(*command(policy, out, samples, *more))
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "model"
    write_model(folder, seed=0)
    return folder


@pytest.mark.timeout(600)
def test_killed_and_resumed_and_grown_is_what_was_never_disturbed(model: Path, tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    evaluate(model, undisturbed, 16)

    process = subprocess.Popen(
        runs.command(*command(model, killed, 8)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=runs.ROOT,
        env=runs.environment(),
    )
    runs.wait_for("the third batch", lambda: len(list(killed.glob("*/samples/shard-*"))) >= 3, process)
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(everyone, timeout=60)
    assert not alive
    had = kept(killed).count()
    assert 0 < had < 12 * 8

    started = time.time()
    evaluate(model, killed, 16)
    assert numbers(killed) == numbers(undisturbed)
    assert kept(killed).count() == 12 * 16
    assert kept(killed).digest() == kept(undisturbed).digest()
    new = [path for path in killed.glob("*/samples/shard-*") if path.stat().st_mtime > started]
    assert len(new) == (12 * 16 - had) // 8  # what is missing, in batches of 8

    result_of_16 = result(killed)
    evaluate(model, killed, 8, "--against", f"{undisturbed}.json")  # 8 of the 16 that there are
    assert kept(killed).count() == 12 * 16
    assert result(killed)["counts"].keys() == result_of_16["counts"].keys()
    assert result(killed)["against"]["benchmarks"]["countdown3-validation"]["problems"] == 12


@pytest.mark.timeout(600)
def test_any_checkpoint_of_a_run(tmp_path: Path) -> None:
    """A step's policy, as training measured it, and its Megatron checkpoint written at TP 2: one set of samples."""
    run = tmp_path / "run"
    short = ["algorithm.iterations=1", "algorithm.rl_steps=2", "sft.limit=2560", "checkpoint.keep=20"]
    runs.finish(runs.start(run, "layout.tp=2", *short), run)
    assert runs.status(run)["cache"]["trajectories"] >= 2 * 24 * 16
    out = tmp_path / "out"

    def evaluated(policy: Path, *more: str) -> dict[str, Any]:
        done = runs.rloop(
            *("evaluate", "--policy", str(policy), "--data", "countdown3:validation", "--out", str(out)),
            *("--json", f"{out}.json", *more),
        )
        assert done.returncode == 0, done.stderr
        return result(out)

    by_step = evaluated(run, "--step", "i0_explore_000002")
    in_training = json.loads((run / "evaluation" / "i0_explore_000002.json").read_text())
    assert by_step["counts"] == in_training["counts"]  # by the run's own keys
    assert by_step["metrics"]["avg@8"] == in_training["metrics"]["avg@8"]
    assert in_training["problem_digests"].keys() >= in_training["counts"].keys()
    converted = evaluated(run / "checkpoints" / "i0_explore_000002", "experiment=tiny")
    assert converted["counts"] == by_step["counts"]
    assert converted["policy_digest"] == by_step["policy_digest"]
    assert len(list(out.glob("countdown3-validation-*"))) == 1
    assert evaluated(run)["policy"] == runs.status(run)["best"]["path"]
    for wrong in (["--step", "i7_explore_000001"], ["--step", "last", "experiment=tiny"]):
        done = runs.rloop("evaluate", "--policy", str(run), "--data", "countdown3:validation", *wrong)
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1
