"""Checkpoints that are written while training goes on, at several layouts and with either optimizer."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from parity import HERE, tensor_distance
from parity_model import write
from ranks import launch

LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "TP2": ({"tp": 2}, "fp32"),
    "PP2": ({"pp": 2, "stages": [2, 2]}, "fp32"),
    "DP2": ({"dp": 2}, "fp32"),
    "empty stage": ({"pp": 2, "stages": [0, 4]}, "bf16"),
    "TP1": ({}, "fp32"),
}
TWO_RANKS = ("TP2", "PP2", "DP2")
OPTIMIZERS = {"": True, " plain": False}  # the distributed optimizer, and Megatron's other one
TWO = [f"{layout}{optimizer}" for layout in TWO_RANKS for optimizer in OPTIMIZERS]
EMPTY = [f"empty stage{optimizer}" for optimizer in OPTIMIZERS]  # its norms, none, are a group of Megatron's optimizer
ONE = [f"TP1{optimizer}" for optimizer in OPTIMIZERS]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    write("dense", folder / "dense")
    jobs = [
        {
            "name": f"{name}{optimizer}",
            "layout": layout,
            "precision": precision,
            "distributed_optimizer": distributed,
            "resume": [f"{other}{optimizer}.async" for other in TWO_RANKS] if name == "TP1" else [],
        }
        for name, (layout, precision) in LAYOUTS.items()
        for optimizer, distributed in OPTIMIZERS.items()
    ]
    for ranks, names in ((2, TWO + EMPTY), (1, ONE)):
        chosen = [job for job in jobs if job["name"] in names]
        launch(HERE / "worker_checkpoints.py", json.dumps(chosen), folder, processes=ranks)
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in TWO + EMPTY + ONE}


@pytest.mark.parametrize("name", TWO + EMPTY + ONE)
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_checkpoint_is_of_the_moment_it_was_started(results: dict[str, dict[str, Any]], name: str, kind: str) -> None:
    """To the bit, though all of `async` was written after two more updates; which the writing left alone in turn."""
    result = results[name]
    assert not result["premature"]
    assert tensor_distance(result["trained"], result["saved"]) > 1e-3
    assert tensor_distance(result[f"{name}.{kind}"]["loaded"], result["saved"]) == 0.0
    assert tensor_distance(result[f"{name}.{kind}"]["trained"], result["trained"]) == 0.0


@pytest.mark.parametrize("name", TWO)
def test_one_process_goes_on_from_any_of_them(results: dict[str, dict[str, Any]], name: str) -> None:
    optimizer = " plain" if name.endswith("plain") else ""
    resumed = results[f"TP1{optimizer}"][f"{name}.async"]
    assert tensor_distance(resumed["loaded"], results[name]["saved"]) == 0.0
    assert tensor_distance(resumed["trained"], results[name]["trained"]) <= TOLERANCE


def test_a_bit_that_a_disk_has_changed_is_said_on_every_rank(results: dict[str, dict[str, Any]]) -> None:
    """Whoever read it: none may go on, or wait for the others."""
    one, other = results["TP2"]["changed"]
    assert one == other
    assert one.pop("none") == ["no UserError"]
    (unread,) = one.pop("unreadable")
    assert unread.endswith("TP2.async can't be read by rank 1 ([Errno 5] Input/output error)")
    assert len(one) == 2
    for name, said in one.items():
        assert all(f"TP2.async/{name} has another content than was written" in each for each in said), said


def test_a_failed_write_is_a_fault_on_every_rank_and_no_checkpoint(results: dict[str, dict[str, Any]]) -> None:
    failures = results["TP2"]["failures"]
    for rank, (full, slow, no_space, no_policy, no_start, no_end) in enumerate(failures["said"]):
        assert "failures/full was not written: rank 1: OSError: [Errno 27] File too large" in full
        assert "failures/slow was not written: rank 1: its file took more than 1 s" in slow
        assert "failures/no_space was not written: rank 1: OSError: [Errno 28] No space left on device" in no_space
        assert no_policy == ("[Errno 28] No space left on device" if rank == 0 else "no OSError")
        assert "failures/no_start was not written: rank 0: OSError: [Errno 28] No space left on device" in no_start
        assert "failures/no_end was not written: rank 0: OSError: [Errno 28] No space left on device" in no_end
        assert "rank 0" not in full + slow + no_space
    assert failures["left"] == []
    assert failures["then"] == ["well", "well_too"]
