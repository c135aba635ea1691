"""TP2, PP2 and DP2 against one process: loss, gradients, weights, checkpoints. Each layout trains in a torchrun."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import launch
from reference import fine_tuning_gradient, megatron_to_hf
from toy_data import full_weights

HERE = Path(__file__).parent
LAYOUTS = {"tp2": (2, 1, 1), "pp2": (1, 2, 1), "dp2": (1, 1, 2), "one": (1, 1, 1)}
TOLERANCE = 1e-5


def train(layout: tuple[int, int, int], out: Path, *checkpoints: Path) -> dict[str, Any]:
    command = [str(HERE / "worker_layouts.py"), *map(str, (*layout, out, *checkpoints))]
    launch(command, processes=math.prod(layout))
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each layout trained; one process last, which also resumes the checkpoints of TP2 and PP2."""
    folder = tmp_path_factory.mktemp("layouts")
    trained = {name: train(LAYOUTS[name], folder / f"{name}.pt") for name in ("tp2", "pp2", "dp2")}
    checkpoints = [folder / "tp2.checkpoint", folder / "pp2.checkpoint"]
    return trained | {"one": train(LAYOUTS["one"], folder / "one.pt", *checkpoints)}


def difference(tensors: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """max |difference| / max |reference| over all tensors."""
    assert tensors.keys() == reference.keys()
    largest = max(float(tensor.abs().max()) for tensor in reference.values())
    return max(float((tensors[name] - reference[name]).abs().max()) for name in reference) / largest


def computed(metrics: dict[str, float]) -> dict[str, float]:
    """Without the time it took."""
    return {name: value for name, value in metrics.items() if not name.startswith("seconds_")}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("update", ["sft_one", "sft_many", "rl_one", "rl_many"])
def test_loss_and_gradients_depend_on_neither_layout_nor_micro_batches(
    results: dict[str, dict[str, Any]], layout: str, update: str
) -> None:
    metrics, gradients = results[layout][update]
    reference_metrics, reference_gradients = results["one"][update.split("_")[0] + "_one"]
    assert computed(metrics) == pytest.approx(computed(reference_metrics), rel=TOLERANCE)
    assert difference(gradients, reference_gradients) <= TOLERANCE


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2"])
def test_three_updates_give_the_same_weights(results: dict[str, dict[str, Any]], layout: str) -> None:
    assert difference(results[layout]["trained"], results["one"]["trained"]) <= TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resuming_at_the_same_layout_changes_no_bit(results: dict[str, dict[str, Any]], layout: str) -> None:
    assert difference(results[layout]["resumed"], results[layout]["trained"]) == 0.0


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_one_process_resumes_the_checkpoint_of_another_layout(results: dict[str, dict[str, Any]], layout: str) -> None:
    assert difference(results["one"][f"resumed_{layout}"], results["one"]["trained"]) <= TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_begin_forgets_weights_moments_and_schedule(results: dict[str, dict[str, Any]], layout: str) -> None:
    assert difference(results[layout]["trained_again"], results[layout]["trained"]) == 0.0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_non_finite_loss_leaves_the_weights_and_is_counted(results: dict[str, dict[str, Any]], layout: str) -> None:
    assert results[layout]["skipped"]["skipped"] == 1.0
    assert difference(results[layout]["after_skip"], results[layout]["before"]) == 0.0


def test_gradient_is_that_of_the_global_token_mean(results: dict[str, dict[str, Any]]) -> None:
    """Against transformers' Qwen2 and plain autograd from the same weights; this also is a parity of the logits."""
    metrics, gradients = results["one"]["sft_many"]
    loss, reference = fine_tuning_gradient(full_weights(1), rows=7, seed=0)
    assert metrics["loss"] == pytest.approx(loss, rel=TOLERANCE)
    ours = {name: tensor for name, tensor in megatron_to_hf(gradients).items() if name != "lm_head.weight"}
    assert difference(ours, reference) <= TOLERANCE


def test_bf16_has_fp32_main_weights_and_resumes_to_the_bit(tmp_path: Path) -> None:
    """One step of 1e-5 is lost in bf16's rounding of a weight of 0.3; twenty add up only in fp32 main weights."""
    out = tmp_path / "bf16.pt"
    launch([str(HERE / "worker_bf16.py"), str(out)], processes=1)
    trained = torch.load(out, weights_only=True)

    def changed(name: str) -> float:
        pairs = [(trained["start"][key], trained[name][key]) for key in trained["start"]]
        large = [(a != b)[a.abs() > 0.01] for a, b in pairs]
        return float(torch.cat(large).float().mean())

    assert all(tensor.dtype == torch.bfloat16 for tensor in trained["all"].values())
    assert changed("all") > 3 * changed("one")
    assert all(torch.equal(trained["resumed"][name], tensor) for name, tensor in trained["all"].items())
