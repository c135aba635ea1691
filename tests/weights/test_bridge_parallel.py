"""The bridge over ranks, in two and four processes: transformers' logits and the folder's tensors, bit for bit; and the
conversions: Megatron loads what they write, and they read what Megatron saves, at every layout. Run it to print the
table of logits.

python tests/weights/test_bridge_parallel.py
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))

from bridge_ranks import LAYOUTS, fits
from ranks import launch
from safetensors.torch import save_file
from tiny_models import make_folder, some_ids

from rloop_mcore.weights import hf_to_mcore, mcore_to_hf
from rloop_mcore.weights.digest import digest_of
from rloop_mcore.weights.sections import Layout

CASES = {
    "qwen2-ratio7": {"family": "qwen2", "kv_heads": 2, "ratio": 7, "tied": False},
    "qwen2-bf16": {"family": "qwen2", "kv_heads": 2, "ratio": 1, "tied": False, "dtype": torch.bfloat16},
    "llama-tied": {"family": "llama", "kv_heads": 2, "ratio": 4, "tied": True},
    "qwen2-fewer-kv-heads-than-tp": {"family": "qwen2", "kv_heads": 1, "ratio": 4, "tied": True},
    "mistral": {"family": "mistral", "kv_heads": 2, "ratio": 4, "tied": False},
    "qwen3": {"family": "qwen3", "kv_heads": 2, "ratio": 2, "tied": True},
    "qwen3-moe": {"family": "qwen3_moe", "kv_heads": 2, "ratio": 2, "tied": False},
    "qwen3-moe-tied": {"family": "qwen3_moe", "kv_heads": 2, "ratio": 1, "tied": True, "norm_topk_prob": False},
}
RUNS = [
    (world, layout, name)
    for world, layouts in LAYOUTS.items()
    for layout in layouts
    for name, case in CASES.items()
    if fits(name, case["kv_heads"] * case["ratio"], layouts[layout])
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cases(tmp_path_factory.mktemp("cases"))


def make_cases(folder: Path) -> Path:
    for name, case in CASES.items():
        model = make_folder(folder / name, **case)
        with torch.no_grad():
            save_file({"logits": model(some_ids()).logits.float()}, folder / name / "expected_logits")
        experts = 2 if "moe" in name else 1
        for layout in (Layout(), Layout(tp=1 if case["kv_heads"] % 2 else 2, pp=2, ep=experts)):
            target = folder / name / f"mcore-tp{layout.tp}-pp{layout.pp}-ep{layout.ep}"
            hf_to_mcore.plan(folder / name, target, layout, threads=2).run(lambda size: None)
    return folder


@functools.cache
def differences(folder: Path, world: int) -> dict[str, float | None]:
    launch(Path(__file__).with_name("bridge_ranks.py"), folder, processes=world)
    return json.loads((folder / f"differences-{world}.json").read_text())


@pytest.mark.parametrize(("world", "layout", "case"), RUNS)
def test_same_as_transformers(folder: Path, world: int, layout: str, case: str) -> None:
    difference = differences(folder, world)[f"{case}-{layout}"]
    assert digest_of(folder / f"{case}-{layout}") == digest_of(folder / case)
    back = folder / f"{case}-{layout}-back"
    mcore_to_hf.plan(folder / f"{case}-{layout}-mcore", back, config=folder / case, trust=True).run(lambda size: None)
    assert digest_of(back) == digest_of(folder / case)
    if not layout.startswith("cp"):
        assert difference <= (0.25 if case.endswith("bf16") else 1e-4)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        found: dict[str, float | None] = {}
        folder = make_cases(Path(temporary))
        for world in LAYOUTS:
            found |= differences(folder, world)
    print("| layout | " + " | ".join(CASES) + " |\n" + "|---" * (len(CASES) + 1) + "|")
    for layout in (layout for layouts in LAYOUTS.values() for layout in layouts):
        values = [found.get(f"{name}-{layout}") for name in CASES]
        print(f"| {layout} | " + " | ".join("" if value is None else f"{value:.1e}" for value in values) + " |")


if __name__ == "__main__":
    main()
