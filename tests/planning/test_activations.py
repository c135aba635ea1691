"""What a micro-batch leaves in memory, against what autograd keeps on the CPU; whole peaks against those of an H200."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from ranks import launch

from rloop_mcore.config import (
    ActorConfig,
    AlgorithmConfig,
    ClusterConfig,
    Config,
    DataConfig,
    LayoutConfig,
    RftConfig,
    RolloutConfig,
)
from rloop_mcore.planning.activations import Modules, chunk_bytes, micro_batch_tokens
from rloop_mcore.planning.architecture import Architecture
from rloop_mcore.planning.parameters import Chunk
from rloop_mcore.planning.plan import Plan

_SIZES: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 640,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
MODELS = {
    "dense": _SIZES | {"model_type": "qwen2"},
    "qk norm": _SIZES | {"model_type": "qwen3", "head_dim": 48, "tie_word_embeddings": True},
    "moe": _SIZES
    | {
        "model_type": "qwen3_moe",
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "norm_topk_prob": True,
    },
}
LENGTHS = [200, 200, 100, 12]


def saved_bytes(jobs: list[dict[str, Any]], folder: Path, processes: int = 1) -> list[int]:
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    said = launch(Path(__file__).with_name("saved_bytes.py"), file, processes=processes, timeout_s=280)
    found: list[int] = json.loads(said.splitlines()[-1])
    return found


def jobs_of(names: Iterable[str], layouts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "architecture": MODELS[name],
            "layout": layout,
            "precision": precision,
            "actor": {"recompute": recompute},
            "lengths": LENGTHS,
        }
        for name, layout, precision, recompute in product(
            names, layouts, ("bf16", "fp32"), ("none", "selective", "full")
        )
    ]


def check(jobs: list[dict[str, Any]], kept: list[int]) -> None:
    """Within 0.001 %, and 3 % where the shared table of angles is much of it; the greatest error is printed.

    Megatron 0.16 keeps less of experts than 0.19, by up to 0.24 %.
    """
    of_experts = 1e-5 if Version(version("megatron-core")) >= Version("0.19") else 3e-3
    errors = {}
    for job, bytes_kept in zip(jobs, kept, strict=True):
        model, layout = Architecture.of(job["architecture"], "here"), LayoutConfig(**job["layout"])
        modules = Modules(4 if job["precision"] == "fp32" else 2, fused=False, fp8=False)
        chunk, tokens = Chunk(model.layers, True, True), sum(LENGTHS)
        ours = chunk_bytes(model, layout, chunk, tokens, job["actor"]["recompute"], modules)
        case = f"{job['architecture']['model_type']} {job['layout']} {job['precision']} {job['actor']}"
        errors[case] = ours / bytes_kept - 1
    worst = max(errors, key=lambda case: abs(errors[case]))
    print(f"{len(errors)} cases, greatest error {errors[worst]:+.2%}: {worst}")
    allowed = {case: 0.03 if "full" in case else of_experts if "moe" in case else 1e-5 for case in errors}
    assert [case for case, error in errors.items() if abs(error) > allowed[case]] == []


def test_the_formula_is_what_autograd_keeps(tmp_path: Path) -> None:
    jobs = [*jobs_of(MODELS, [{}]), *jobs_of(("dense", "qk norm"), ({"tp": 2}, {"tp": 2, "sp": True}))]
    check(jobs, saved_bytes(jobs, tmp_path))


def test_the_formula_for_experts_over_two_ranks(tmp_path: Path) -> None:
    jobs = jobs_of(["moe"], ({"dp": 2, "ep": 2}, {"tp": 2, "sp": True}, {"tp": 2, "etp": 2, "sp": True}))
    check(jobs, saved_bytes(jobs, tmp_path, processes=2))


QWEN_HALF_B = Architecture(24, 896, 14, 2, 64, 4864, 151936, 4096, tied=True, qkv_bias=True)
QWEN_1_5B = Architecture(28, 1536, 12, 2, 128, 8960, 151936, 4096, tied=True, qkv_bias=True)
HALF_OF_7B = Architecture(14, 3584, 28, 4, 128, 18944, 152064, 4096, qkv_bias=True)
PEAKS = [  # docs/gpu.md: GiB on an H200; eight rows of 4,096 tokens, of which 256 are the prompt
    (QWEN_HALF_B, "bf16", 4, 26),
    (QWEN_1_5B, "bf16", 4, 61),
    (QWEN_1_5B, "fp8_delayed", 4, 59),
    (HALF_OF_7B, "bf16", 2, 95),
    (HALF_OF_7B, "fp8_delayed", 2, 99),
    (HALF_OF_7B, "fp8_tensorwise", 2, 99),
    (HALF_OF_7B, "fp8_blockwise", 2, 99),
]


def gpu_actor_config(precision: str, rows: int) -> Config:
    """What tools/bench/gpu_actor.py trains."""
    return Config(
        precision=precision,
        actor=ActorConfig(micro_batch_tokens=4096 * rows),
        algorithm=AlgorithmConfig(prompts_per_step=8, group_size=1, updates_per_step=1),
        rft=RftConfig(enabled=False),
        data=DataConfig(max_prompt_tokens=256),
        rollout=RolloutConfig(max_tokens=3841, endpoints=["http://elsewhere:1"]),
    )


@pytest.mark.parametrize(("model", "precision", "rows", "measured"), PEAKS)
def test_peaks_measured_on_a_gpu(model: Architecture, precision: str, rows: int, measured: int) -> None:
    (stage,) = Plan.of(model, gpu_actor_config(precision, rows)).stages
    parts = stage.phases["train"]
    predicted = (sum(parts.values()) - parts["runtime"]) / 2**30  # torch counts its own tensors only
    print(f"{predicted:.1f} GiB, measured {measured}")
    assert predicted == pytest.approx(measured, rel=0.05)


def test_tokens_of_a_micro_batch() -> None:
    def tokens(layout: LayoutConfig, **algorithm: int) -> int:
        settings = AlgorithmConfig(**({"prompts_per_step": 64, "group_size": 8, "updates_per_step": 4} | algorithm))
        rows = RftConfig(enabled=False)
        return micro_batch_tokens(Config(layout=layout, algorithm=settings, rft=rows, actor=ActorConfig(1000)))

    assert tokens(LayoutConfig()) == 1024 + 2048 - 1  # one longest sequence
    assert tokens(LayoutConfig(cp=4)) == 1000
    assert tokens(LayoutConfig(tp=8, sp=True)) == 3072
    assert tokens(LayoutConfig(cp=4), prompts_per_step=1, group_size=1, updates_per_step=1) == 768


def test_fewer_bytes_the_more_is_recomputed_or_divided() -> None:
    def kept(layout: LayoutConfig, recompute: str) -> int:
        modules = Modules.of(Config(cluster=ClusterConfig(device="cuda")))
        return chunk_bytes(HALF_OF_7B, layout, Chunk(14, False, False), 8192, recompute, modules)

    whole = kept(LayoutConfig(), "none")
    assert whole > kept(LayoutConfig(), "selective") > kept(LayoutConfig(), "full") == 14 * 8192 * 3584 * 2
    split, sequence = kept(LayoutConfig(tp=4), "none"), kept(LayoutConfig(tp=4, sp=True), "none")
    assert whole / 4 < split < whole
    assert sequence == pytest.approx(whole / 4)
