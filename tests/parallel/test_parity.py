"""Every layout against one process, one process against transformers: logprobs, loss, gradients, weights, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parity import HERE, LAYOUTS, QUANTITIES, REFERENCE, by_number, distances, tensor_distance, train_all
from parity_model import MODELS, build, experiences, hub_named, reference_update, write
from ranks import launch

pytestmark = pytest.mark.timeout(1300)  # the first test waits for every layout; each launch has 400 s

NAMES = [f"{model}, {layout}" for layout, (models, _, _) in LAYOUTS.items() for model in models]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return train_all(tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize("name", NAMES)
def test_a_layout_changes_nothing(results: dict[str, dict[str, Any]], name: str) -> None:
    far = {quantity: value for quantity, value in distances(name, results).items() if not value <= TOLERANCE}
    assert set(distances(name, results)) == set(QUANTITIES)
    assert not far


@pytest.mark.parametrize("name", NAMES)
def test_resuming_at_the_same_layout_changes_no_bit(results: dict[str, dict[str, Any]], name: str) -> None:
    assert tensor_distance(results[name][f"resumed {name}"], results[name]["weights"]) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_the_norm_that_clips_is_of_the_whole_models_gradients(results: dict[str, dict[str, Any]], name: str) -> None:
    squares = [gradient.double().square().sum() for gradient in results[name]["gradients"].values()]
    assert results[name]["metrics"]["grad_norm"] == pytest.approx(float(torch.stack(squares).sum().sqrt()), rel=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_one_process_agrees_with_transformers(results: dict[str, dict[str, Any]], model: str) -> None:
    """Against unpadded rows, plain autograd and DAPO's formula written out."""
    ours = results[f"{model}, {REFERENCE}"]
    theirs = build(model)
    logprobs, loss = reference_update(theirs, experiences(0))
    assert tensor_distance(by_number(ours["logprobs"]), by_number(logprobs)) <= TOLERANCE
    assert ours["metrics"]["loss"] == pytest.approx(loss, rel=TOLERANCE)
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert tensor_distance(ours["gradients"], hub_named(gradients)) <= TOLERANCE


def test_bf16_has_fp32_main_weights_and_resumes_to_the_bit(tmp_path: Path) -> None:
    """One step of 1e-5 is lost in bf16's rounding of a weight of 0.3; twenty add up only in fp32 main weights."""
    out = tmp_path / "bf16.pt"
    launch(HERE / "worker_bf16.py", write("dense", tmp_path / "model"), out, processes=1)
    trained = torch.load(out, weights_only=True)

    def changed(name: str) -> float:
        pairs = [(trained["start"][key], trained[name][key]) for key in trained["start"]]
        large = [(a != b)[a.abs() > 0.01] for a, b in pairs]
        return float(torch.cat(large).float().mean())

    assert all(tensor.dtype == torch.bfloat16 for tensor in trained["all"].values())
    assert changed("all") > 3 * changed("one")
    assert all(torch.equal(trained["resumed"][name], tensor) for name, tensor in trained["all"].items())
