"""Training in bf16 on CUDA: resume, checkpoints to and from the CPU, skipped updates, the optimizer's options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gpu_jobs import Results, relative, run, write_model

UPDATES = 10
# What gloo cannot run: these need CUDA.
OPTIONS: dict[str, dict[str, Any]] = {
    "replicated optimizer": {"distributed_optimizer": False},
    "offload half": {"optimizer_offload": 0.5},
    "offload all": {"optimizer_offload": 1.0},
    "precision aware": {"precision_aware_optimizer": True},
}


def job(name: str, task: str, folder: Path, actor: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    config = {"actor": actor or {}}
    return {"name": name, "task": task, "model": "dense", "folder": str(folder), "config": config, **more}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("dense", tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def plain(folder: Path) -> Results:
    jobs = [job("train", "train", folder, updates=UPDATES), job("clip", "clip", folder)]
    return run([*jobs, job("not finite", "not_finite", folder)], folder)


def test_a_resume_goes_on_as_if_nothing_had_happened(plain: Results) -> None:
    losses = plain["train"]["losses"]
    assert losses[-1] < losses[0] - 0.2
    assert plain["train"]["resumed"] == pytest.approx(losses[UPDATES // 2 :], rel=0.01)


def test_a_loss_that_is_not_finite_leaves_the_weights_alone(plain: Results) -> None:
    result = plain["not finite"]
    assert (result["skipped"], result["next"]["skipped"]) == (1.0, 0.0)
    assert relative(result["after"], result["before"]) == 0.0


@pytest.mark.parametrize("option", OPTIONS)
def test_the_optimizers_options_train_and_resume_alike(plain: Results, folder: Path, option: str) -> None:
    actor = OPTIONS[option]
    jobs = [job(option, "train", folder, actor, updates=UPDATES), job(f"{option}, clip", "clip", folder, actor)]
    results = run(jobs, folder)
    assert results[option]["losses"] == pytest.approx(plain["train"]["losses"], rel=0.03)
    assert results[option]["resumed"] == pytest.approx(plain["train"]["resumed"], rel=0.03)
    wanted, got = plain["clip"], results[f"{option}, clip"]
    assert wanted["grad_norm"] > 0.02  # twice the limit at least: there is something to clip
    assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=0.02)
    change = {name: got["end"][name] - start for name, start in got["start"].items()}
    assert relative(change, {name: wanted["end"][name] - start for name, start in wanted["start"].items()}) < 0.1


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_a_deterministic_run_repeats_to_the_bit(tmp_path: Path, model: str) -> None:
    """In another process, where kernels are chosen anew; and in the process that goes on from a checkpoint."""
    folder, trained = write_model(model, tmp_path), []
    for name in ("once", "again"):
        again = job(name, "train", folder, updates=UPDATES)
        again |= {"model": model, "config": {"run": {"deterministic": True}}}
        trained.append(run([again], folder)[name])
    assert trained[0]["losses"] == trained[1]["losses"]
    assert relative(trained[0]["one"], trained[1]["one"]) == 0.0
    assert all(result["resumed"] == result["losses"][UPDATES // 2 :] for result in trained)


# How far the next updates may be apart: in bf16 a token near two experts goes to the other one on the other device.
@pytest.mark.parametrize(("model", "noise"), [("dense", 0.2), ("moe", 0.5)])
@pytest.mark.parametrize(("source", "target"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_checkpoint_moves_between_cpu_and_gpu(
    tmp_path: Path, model: str, noise: float, source: str, target: str
) -> None:
    folder = write_model(model, tmp_path)
    saved = str(folder / f"{source}.checkpoint")
    written = run([job(f"{source} writes", "checkpointed", folder, save=saved)], folder, device=source)
    read = run([job(f"{target} reads", "checkpointed", folder, load=saved)], folder, device=target)
    before, after = written[f"{source} writes"], read[f"{target} reads"]
    assert relative(after["weights"], before["weights"]) == 0.0
    # Moments and step count too: the next update is the same, up to bf16's noise in the gradient.
    wanted = {name: before["next"][name] - weight for name, weight in before["weights"].items()}
    got = {name: after["next"][name] - weight for name, weight in after["weights"].items()}
    assert relative(got, wanted) < noise
