"""The bridge over tensor and pipeline ranks, in two processes: the same logits and the same tensors, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import make_folder, some_ids

from rloop_mcore.weights.digest import digest_of

CASES = {
    "qwen2-ratio7": {"family": "qwen2", "kv_heads": 2, "ratio": 7, "tied": False},
    "qwen2-bf16": {"family": "qwen2", "kv_heads": 2, "ratio": 1, "tied": False, "dtype": torch.bfloat16},
    "llama-tied": {"family": "llama", "kv_heads": 2, "ratio": 4, "tied": True},
    "qwen2-fewer-kv-heads-than-tp": {"family": "qwen2", "kv_heads": 1, "ratio": 4, "tied": True},
}
LAYOUTS = ("tp2", "pp2", "dp2")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("cases")
    for name, case in CASES.items():
        model = make_folder(folder / name, **case)
        with torch.no_grad():
            save_file({"logits": model(some_ids()).logits.float()}, folder / name / "expected_logits")
    script = Path(__file__).with_name("two_rank_bridge.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*torchrun, str(script), str(folder), *LAYOUTS], timeout=150, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder, json.loads((folder / "differences.json").read_text())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_same_as_transformers(results: tuple[Path, dict[str, float]], case: str, layout: str) -> None:
    folder, differences = results
    assert digest_of(folder / f"{case}-{layout}") == digest_of(folder / case)
    assert differences[f"{case}-{layout}"] <= (0.25 if case.endswith("bf16") else 1e-4)
