"""FP8 by Transformer Engine: its error against the simulation's, training, and what a checkpoint keeps of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_jobs import Results, reference, relative, run, write_model

RECIPES = ("fp8_delayed", "fp8_tensorwise", "fp8_blockwise", "mxfp8")
LAYERS, UPDATES = 4, 30


def job(name: str, task: str, folder: Path, precision: str, **fp8: Any) -> dict[str, Any]:
    config = {"precision": precision, "fp8": fp8}
    return {"name": name, "task": task, "model": "dense", "folder": str(folder), "config": config, "updates": UPDATES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("dense", tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def bf16(folder: Path) -> Results:
    jobs = [job("bf16 update", "update", folder, "bf16"), job("bf16 train", "train", folder, "bf16")]
    return run(jobs, folder)


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> str:
    if request.param == "mxfp8" and torch.cuda.get_device_capability() < (10, 0):
        pytest.skip("mxfp8 needs a Blackwell GPU (compute capability 10.0)")
    return str(request.param)


@pytest.fixture(scope="module")
def fp8(folder: Path, recipe: str) -> Results:
    jobs = [job(f"{recipe} {task}", task, folder, recipe) for task in ("update", "train", "not_finite")]
    again = job(f"{recipe} recompute", "update", folder, recipe)
    again["config"]["actor"] = {"recompute": "full"}
    jobs.append(again)
    if recipe != "fp8_delayed":
        ends = {"first_bf16_layers": 1, "last_bf16_layers": 1}
        jobs.append(job(f"{recipe} ends in bf16", "update", folder, recipe, **ends))
    return run(jobs, folder)


def test_every_layer_is_in_fp8(fp8: Results, bf16: Results, recipe: str) -> None:
    assert fp8[f"{recipe} update"]["fp8_layers"] == [True] * LAYERS
    assert bf16["bf16 update"]["fp8_layers"] == [False] * LAYERS


def test_the_error_is_the_simulations(fp8: Results, bf16: Results, folder: Path, recipe: str) -> None:
    """Of the gradients: more than bf16's, and what the simulation on the CPU says, to a factor of two."""
    simulated = run([job(f"{recipe} simulated", "update", folder, recipe, simulate=True)], folder, device="cpu")
    wanted = reference(folder, "dense")["gradients"]
    predicted = relative(simulated[f"{recipe} simulated"]["gradients"], wanted)
    measured = relative(fp8[f"{recipe} update"]["gradients"], wanted)
    without = relative(bf16["bf16 update"]["gradients"], wanted)
    print(f"{recipe}: gradients {measured:.2%}, simulated {predicted:.2%}, bf16 {without:.2%}")
    assert measured > 2 * without
    assert predicted / 2 < measured < 2 * predicted


def test_first_and_last_layers_stay_bf16(fp8: Results, folder: Path, recipe: str) -> None:
    if recipe == "fp8_delayed":
        pytest.skip("Megatron keeps no layer in bf16 under fp8_delayed")
    part = fp8[f"{recipe} ends in bf16"]
    assert part["fp8_layers"] == [False, True, True, False]
    wanted = reference(folder, "dense")["gradients"]
    assert relative(part["gradients"], wanted) < relative(fp8[f"{recipe} update"]["gradients"], wanted)


def test_a_recomputation_rounds_as_the_pass_that_it_repeats(fp8: Results, recipe: str) -> None:
    """By the scales of that pass: others round each activation by some percent otherwise."""
    difference = relative(fp8[f"{recipe} recompute"]["gradients"], fp8[f"{recipe} update"]["gradients"])
    print(f"{recipe}: gradients with recomputation differ by {difference:.2%}")
    assert difference < 0.02


def test_training_decreases_the_loss_as_bf16_does(fp8: Results, bf16: Results, recipe: str) -> None:
    losses, plain = fp8[f"{recipe} train"]["losses"], bf16["bf16 train"]["losses"]
    assert plain[0] - plain[-1] > 0.5
    assert losses[0] - losses[-1] > 0.8 * (plain[0] - plain[-1])


def test_a_resume_goes_on_as_if_nothing_had_happened(fp8: Results, recipe: str) -> None:
    """Scales included: fp8_delayed without them starts at scale 1, where weights of 0.03 keep three bits."""
    train = fp8[f"{recipe} train"]
    uninterrupted = train["losses"][UPDATES // 2 :]
    assert train["resumed"][0] == pytest.approx(uninterrupted[0], rel=2e-3)
    assert train["resumed"][-1] == pytest.approx(uninterrupted[-1], rel=0.05)


@pytest.mark.parametrize("gather", [False, True])
def test_another_process_goes_on_with_the_scales(folder: Path, gather: bool) -> None:
    """It has not run a layer yet when it loads; at scale 1 its first update would be another one."""
    saved = str(folder / f"delayed-{gather}.checkpoint")
    name, config = "delayed", {"precision": "fp8_delayed", "fp8": {"parameter_gather": gather}}
    common = {"name": name, "task": "checkpointed", "model": "dense", "folder": str(folder), "config": config}
    before = run([common | {"save": saved}], folder)[name]
    after = run([common | {"load": saved}], folder)[name]
    assert relative(after["weights"], before["weights"]) == 0.0
    wanted = {key: before["next"][key] - weight for key, weight in before["weights"].items()}
    got = {key: after["next"][key] - weight for key, weight in after["weights"].items()}
    print(f"fp8_delayed: an update after a resume differs by {relative(got, wanted):.2%}")
    assert relative(got, wanted) < 0.1


def test_a_loss_that_is_not_finite_leaves_weights_and_scales_alone(fp8: Results, recipe: str) -> None:
    result = fp8[f"{recipe} not_finite"]
    assert result["skipped"] == 1.0
    assert relative(result["after"], result["before"]) == 0.0
    assert result["next"]["skipped"] == 0.0
    assert result["next"]["grad_norm"] < 1e3


def test_parameter_gather_trains_from_the_weights_it_was_given(
    bf16: Results, folder: Path, recipe: str, request: pytest.FixtureRequest
) -> None:
    """Not from Megatron's own initial values, which it keeps in high precision beside parameters in FP8."""
    if recipe == "fp8_blockwise":
        reason = "weights read back as zeros and NaN on an H200: the configuration refuses it"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))
    name = f"{recipe} gather"
    train = run([job(name, "train", folder, recipe, parameter_gather=True)], folder)[name]
    given = bf16["bf16 train"]["start"]
    assert relative(train["start"], given) < 0.05  # E4M3 keeps 4 bits: 2.6 % root mean square at most
    assert relative(train["one"], given) < 0.1  # and one update of 3e-4 changes a weight of 0.03 by 1 %
    assert train["losses"][-1] < train["losses"][0] - 0.4
    assert train["resumed"][0] == pytest.approx(train["losses"][UPDATES // 2], rel=2e-3)


def test_experts_train_as_in_bf16(tmp_path: Path, recipe: str) -> None:
    """And go on from a checkpoint, scales included."""
    folder, names = write_model("moe", tmp_path), ("bf16", recipe)
    results = run([job(f"experts {name}", "train", folder, name) | {"model": "moe"} for name in names], folder)
    plain, train = (results[f"experts {name}"] for name in names)
    fallen = plain["losses"][0] - plain["losses"][-1]
    assert fallen > 0.5
    assert train["losses"][0] - train["losses"][-1] > 0.8 * fallen
    assert train["resumed"][0] == pytest.approx(train["losses"][UPDATES // 2], rel=1e-2)
