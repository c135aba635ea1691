"""An engine that shares the trainer's GPU: weights by CUDA IPC and by NCCL, memory given up and taken back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from gpu_jobs import SGLANG_VARIABLE, Results, rms, run, write_model

ENGINES = ("embedded", "sglang")
WAYS = ("ipc", "nccl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model("dense", tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module", params=[(engine, way) for engine in ENGINES for way in WAYS], ids=" ".join)
def synced(request: pytest.FixtureRequest, folder: Path) -> dict[str, Any]:
    engine, way = request.param
    if engine == "sglang" and SGLANG_VARIABLE not in os.environ:
        pytest.skip(f"{SGLANG_VARIABLE} names no interpreter that has SGLang")
    name = f"{engine} by {way}"
    job = {"name": name, "task": "synced", "folder": str(folder), "engine": engine, "way": way, "sleep": True}
    results: Results = run([job], folder, two_hosts=way == "nccl")
    return results[name] | {"name": name}


def test_the_engine_draws_from_the_weights_it_was_sent(synced: dict[str, Any]) -> None:
    """Both in bf16, by other kernels; the weights of an update before would show."""
    for version in (0, 1):
        error = rms(synced["engine"][version], synced["actor"][version])
        print(f"{synced['name']}: mismatch {error:.4f}; {synced['syncs'][version]}")
        assert error < 0.03
    assert rms(synced["engine"][1], synced["stale"]) > 0.3


def test_an_engine_that_sleeps_leaves_its_memory_to_the_trainer(synced: dict[str, Any]) -> None:
    if "embedded" in synced["name"]:
        pytest.skip("the embedded engine keeps no cache between calls, and this model is of 5 MB")
    awake, asleep, again = synced["free"]
    print(f"{synced['name']}: free {awake / 2**30:.2f} GiB awake, {asleep / 2**30:.2f} asleep, {again / 2**30:.2f}")
    assert asleep > awake + 2**30
    assert again < asleep - 2**30
