"""Every option of an update against its formula in transformers and autograd, phases, skipped updates, replay."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from options import UPDATES, adam_reference, fine_tuning_reference, token_logprobs, update_reference
from parity import HERE, by_number, tensor_distance
from parity_model import TEMPERATURE, build, experiences, hub_named, reference_update, write
from ranks import launch
from transformers import PreTrainedModel

TOLERANCE = 3e-5  # ours in fp32, the formulas in fp64
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "TP2": {"tp": 2},
    "PP2": {"pp": 2, "stages": [2, 2]},
    "CP2": {"cp": 2},
    "DP2": {"dp": 2},
}
WHAT = [
    (layout, option) for option in UPDATES for layout in LAYOUTS if layout == "one" or option in ("all", "Dr. GRPO")
]
REPLAY: dict[str, tuple[dict[str, Any], str]] = {
    "one": ({}, "none"),
    "one, recompute full": ({}, "full"),
    "EP2": ({"ep": 2, "dp": 2}, "none"),
    "CP2": ({"cp": 2}, "none"),
    "TP2 SP, recompute full": ({"tp": 2, "sp": True}, "full"),
    "PP2 VPP2": ({"pp": 2, "vpp": 2, "stages": [1, 1, 1, 1]}, "none"),
    "PP2, one empty": ({"pp": 2, "stages": [4, 0]}, "none"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By "LAYOUT, TASK OR OPTION"."""
    folder = tmp_path_factory.mktemp("options")
    dense, moe = write("dense", folder / "dense"), write("moe", folder / "moe")
    jobs: list[dict[str, Any]] = []

    def add(name: str, task: str, model: Path, layout: dict[str, Any], algorithm: Any = None, **actor: str) -> None:
        job = {"name": name, "task": task, "folder": str(model), "layout": layout, "actor": actor}
        jobs.append(job | {"algorithm": algorithm or {}})

    for layout_name, layout in LAYOUTS.items():
        add(f"{layout_name}, fine_tune", "fine_tune", dense, layout)
        add(f"{layout_name}, decay", "decay", dense, layout)
        add(f"{layout_name}, gate", "gate", dense, layout)
        add(f"{layout_name}, phases", "phases", dense, layout, {"kl_coefficient": 0.1})
    for layout_name, option in WHAT:
        add(f"{layout_name}, {option}", "update", dense, LAYOUTS[layout_name], UPDATES[option])
    for name, (layout, recompute) in REPLAY.items():
        add(f"{name}, replay", "replay", moe, layout, routing_replay="first_forward", recompute=recompute)
    for processes in (1, 2):
        chosen = [job for job in jobs if (job["name"].startswith("one")) == (processes == 1)]
        launch(HERE / "worker_options.py", json.dumps(chosen), folder, processes=processes)
    return {job["name"]: torch.load(folder / f"{job['name']}.pt", weights_only=True) for job in jobs}


def gradients_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return hub_named({name: p.grad for name, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize(("layout", "option"), WHAT)
def test_an_update_is_that_of_its_formula(results: dict[str, dict[str, Any]], layout: str, option: str) -> None:
    result, model = results[f"{layout}, {option}"], build("dense").double()
    wanted = update_reference(model, UPDATES[option])
    assert tensor_distance(result["gradients"], gradients_of(model)) <= TOLERANCE
    metrics = {name: value for name, value in result["metrics"].items() if name in wanted}
    assert metrics == pytest.approx({name: wanted[name] for name in metrics}, rel=1e-4)
    told = {"kl": "kl_coefficient", "importance_mean": "importance", "off_policy_kept": "off_policy_mask"}
    assert metrics.keys() == {name for name in wanted if name not in told or told[name] in UPDATES[option]}


def test_the_batch_exercises_every_option() -> None:
    """Else the test above could not fail: each option changes the loss, and the masks drop some but not all."""
    losses = {name: update_reference(build("dense"), options) for name, options in UPDATES.items()}
    plain = update_reference(build("dense"), {})
    assert all(abs(losses[name]["loss"] - plain["loss"]) > 1e-3 for name in UPDATES)
    assert 0.1 < losses["off-policy mask"]["off_policy_kept"] < 0.9
    assert 0.1 < plain["clip_fraction"] < 0.9
    assert losses["masked importance"]["importance_mean"] < losses["truncated importance"]["importance_mean"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", ["token_mean", "reward_weighted"])
def test_fine_tuning_is_that_of_its_formula(results: dict[str, dict[str, Any]], layout: str, loss: str) -> None:
    result, model = results[f"{layout}, fine_tune"][loss], build("dense").double()
    assert result["metrics"]["loss"] == pytest.approx(fine_tuning_reference(model, loss), rel=TOLERANCE)
    assert tensor_distance(result["gradients"], gradients_of(model)) <= TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adam_is_torchs_and_norms_and_biases_do_not_decay(results: dict[str, dict[str, Any]], layout: str) -> None:
    result, model = results[f"{layout}, decay"], build("dense").double()
    norms, rates = adam_reference(model)
    assert result["norms"] == pytest.approx(norms, rel=1e-4)
    assert result["rates"] == pytest.approx(rates)
    wanted = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert tensor_distance(result["weights"], wanted) <= TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_begin_forgets_weights_moments_and_schedule(results: dict[str, dict[str, Any]], layout: str) -> None:
    result = results[f"{layout}, phases"]
    before = {name: parameter.detach() for name, parameter in build("dense").named_parameters()}
    assert tensor_distance(result["first"], before) > 1e-2
    assert tensor_distance(result["second"], result["first"]) == 0.0
    assert result["second start"] == result["first start"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference_is_the_policy_of_the_phases_start(results: dict[str, dict[str, Any]], layout: str) -> None:
    result = results[f"{layout}, phases"]
    assert result["reference"] == result["first start"]
    assert tensor_distance(by_number(result["policy"]), by_number(result["reference"])) > 1e-2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_non_finite_loss_leaves_the_weights_and_is_counted(results: dict[str, dict[str, Any]], layout: str) -> None:
    result = results[f"{layout}, phases"]
    assert result["not finite"]["skipped"] == 1.0
    assert tensor_distance(result["after"], result["second"]) == 0.0
    assert result["sound"]["skipped"] == 0.0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_update_over_the_gate_leaves_no_trace_on_any_rank(results: dict[str, dict[str, Any]], layout: str) -> None:
    result = results[f"{layout}, gate"]
    large, sound = result["ranks"][0]
    assert all(rank == [large, sound] for rank in result["ranks"])
    assert (large[1], sound[1]) == (1.0, 0.0)
    assert sound[0] < result["gate"] < large[0] < float("inf")
    assert tensor_distance(result["after"], result["before"]) == 0.0
    # Adam's state too is what it was
    assert tensor_distance(result["gated"], result["plain"]) == 0.0
    assert tensor_distance(result["gated"], result["before"]) > 1e-3


@contextmanager
def replayed(model: PreTrainedModel, batch: list[Any]) -> Iterator[None]:
    """Every router of transformers' model is turned round, but sends each token where it sent it before."""
    gates = [layer.mlp.gate for layer in model.model.layers]
    chosen: dict[tuple[int, str], torch.Tensor] = {}
    asked: list[str] = []

    def note(number: int) -> Any:
        def hook(gate: Any, inputs: Any, output: Any) -> None:
            chosen[number, asked[-1]] = output[2]

        return hook

    def force(number: int) -> Any:
        def hook(gate: Any, inputs: Any, output: Any) -> Any:
            indices = chosen[number, asked[-1]]
            return output[0], output[0].gather(-1, indices).softmax(-1), indices

        return hook

    def ask(module: Any, arguments: Any, keywords: Any) -> None:
        asked.append(str(keywords["input_ids"].tolist()))

    whose = model.register_forward_pre_hook(ask, with_kwargs=True)
    handles = [gate.register_forward_hook(note(number)) for number, gate in enumerate(gates)]
    with torch.no_grad():
        for row in batch:
            token_logprobs(model, row.trajectory.prompt_ids, row.trajectory.response_ids, TEMPERATURE)
        for gate in gates:
            gate.weight.neg_()
    for handle in handles:
        handle.remove()
    handles = [gate.register_forward_hook(force(number)) for number, gate in enumerate(gates)]
    yield
    for handle in (whose, *handles):
        handle.remove()


@pytest.mark.parametrize("layout", REPLAY)
def test_an_update_repeats_the_recorded_choice_of_experts(results: dict[str, dict[str, Any]], layout: str) -> None:
    result, batch, model = results[f"{layout}, replay"], experiences(0), build("moe")
    assert tensor_distance(by_number(result["recorded"]), by_number(logprobs_of(model))) <= TOLERANCE
    with replayed(model, batch):
        reference_update(model, batch[:-1])
    wanted = gradients_of(model)
    assert tensor_distance(result["gradients"], wanted) <= TOLERANCE
    # and afterwards the routers choose by themselves, which makes a difference
    assert tensor_distance(by_number(result["free"]), by_number(logprobs_of(model))) <= TOLERANCE
    model.zero_grad()
    reference_update(model, batch[:-1])
    assert tensor_distance(gradients_of(model), wanted) > 0.1
    assert result["held"] == 1  # the choices of one micro-batch a router, however many there are
    positions = sum(len(row.trajectory.prompt_ids) + len(row.trajectory.response_ids) - 1 for row in batch)
    split = REPLAY[layout][0]
    layers = sum(split.get("stages", [4])[:: split.get("pp", 1)])
    assert result["kept"] == positions * layers * 2  # bytes: the two experts of a token, of this stage's layers only


def logprobs_of(model: PreTrainedModel) -> list[list[float]]:
    rows = [row.trajectory for row in experiences(0)]
    with torch.no_grad():
        return [token_logprobs(model, t.prompt_ids, t.response_ids, TEMPERATURE)[0].tolist() for t in rows]
