"""Weights, gradients and optimizer state against Megatron's own buffers, made on the meta device at every rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rloop_mcore.compose import load_config
from rloop_mcore.config import ActorConfig, Config, Fp8Config, LayoutConfig, config_folder
from rloop_mcore.planning.architecture import Architecture
from rloop_mcore.planning.layouts import processes
from rloop_mcore.planning.parameters import total_parameters
from rloop_mcore.planning.state import Coordinates, state_of

_SIZES: dict[str, Any] = {  # odd ones: they need padding everywhere
    "num_hidden_layers": 6,
    "hidden_size": 72,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 100,
    "vocab_size": 1003,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
DENSE = _SIZES | {"model_type": "qwen2"}
TIED = DENSE | {"tie_word_embeddings": True}
QK_NORM = _SIZES | {"model_type": "qwen3", "head_dim": 20, "tie_word_embeddings": True}
LLAMA = _SIZES | {"model_type": "llama"}
MOE = _SIZES | {
    "model_type": "qwen3_moe",
    "head_dim": 20,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 36,
    "norm_topk_prob": True,
}
JOBS: list[tuple[dict[str, Any], dict[str, Any], str, bool]] = [  # model, layout, precision, distributed optimizer
    (DENSE, {}, "bf16", True),
    (LLAMA, {"tp": 4, "sp": True}, "bf16", False),
    (DENSE, {"tp": 2, "pp": 2, "dp": 3}, "bf16", True),
    (DENSE, {"pp": 2, "dp": 2, "vpp": 2, "stages": [0, 3, 3, 0]}, "bf16", False),
    (TIED, {"tp": 2, "pp": 3, "dp": 2}, "bf16", True),
    (TIED, {"pp": 2, "vpp": 2, "cp": 2, "dp": 3}, "fp32", True),
    (TIED, {"pp": 4, "dp": 2}, "bf16", True),
    (TIED, {"pp": 3, "dp": 2, "stages": [0, 6, 0]}, "bf16", True),
    (QK_NORM, {"tp": 4, "sp": True, "cp": 2, "dp": 2}, "bf16", True),
    (MOE, {"ep": 4, "dp": 4}, "bf16", True),
    (MOE, {"tp": 2, "sp": True, "ep": 2, "dp": 4, "pp": 2}, "bf16", True),
    (MOE, {"tp": 2, "sp": True, "etp": 2, "ep": 2, "dp": 4}, "bf16", True),
    (MOE, {"tp": 2, "sp": True, "etp": 2, "dp": 3}, "bf16", True),
    (MOE, {"tp": 2, "sp": True, "etp": 4, "dp": 4, "pp": 3}, "bf16", True),
    (MOE, {"tp": 2, "sp": True, "ep": 4, "cp": 2, "dp": 2, "pp": 2, "vpp": 3}, "fp32", False),
]


def megatron_sizes(jobs: list[dict[str, Any]]) -> list[list[dict[str, int]]]:
    worker = Path(__file__).with_name("megatron_sizes.py")
    done = subprocess.run(
        [sys.executable, str(worker)],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        timeout=3600 if "RLOOP_EVERY_RANK" in os.environ else 280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    sizes: list[list[dict[str, int]]] = json.loads(done.stdout.splitlines()[-1])
    return sizes


def test_every_rank_holds_what_megatron_gives_it_to_the_byte() -> None:
    jobs = [
        {
            "architecture": model,
            "layout": layout,
            "precision": precision,
            "actor": {"distributed_optimizer": distributed},
            "ranks": None,
        }
        for model, layout, precision, distributed in JOBS
    ]
    for job, of_ranks in zip(jobs, megatron_sizes(jobs), strict=True):
        config = Config(
            layout=LayoutConfig(**job["layout"]), precision=job["precision"], actor=ActorConfig(**job["actor"])
        )
        model = Architecture.of(job["architecture"], "here")
        for rank, theirs in enumerate(of_ranks):
            ours = vars(state_of(model, config, coordinates(rank, config.layout)))
            assert {key: ours[key] for key in theirs} == theirs, f"rank {rank} of {job['layout']}"


def coordinates(rank: int, layout: LayoutConfig) -> Coordinates:
    """Of a global rank in Megatron's order: tp, cp, dp, pp; of experts etp, ep, their replicas, pp; first fastest."""
    stage_size = layout.tp * layout.cp * layout.dp
    place = rank % stage_size
    return Coordinates(rank // stage_size, place // layout.tp, place // (layout.etp * layout.ep))


def shipped() -> dict[str, tuple[dict[str, Any], Config]]:
    """Job and configuration of the shipped experiments that differ in what a rank holds, by the first one's name."""
    found: dict[str, tuple[dict[str, Any], Config]] = {}
    for file in sorted((config_folder() / "experiment").glob("*.yaml")):
        config = load_config([f"experiment={file.stem}"], absent="-")
        job = {
            "architecture": {key: value for key, value in vars(config.model.architecture).items() if value is not None},
            "layout": vars(config.layout),
            "precision": config.precision,
            "actor": {"distributed_optimizer": config.actor.distributed_optimizer},
        }
        if job not in [other for other, _ in found.values()]:
            found[file.stem] = job, config
    return found


def some_ranks(layout: LayoutConfig) -> list[int]:
    """The first rank of every pipeline stage and the last of all; each where RLOOP_EVERY_RANK is set (minutes)."""
    ranks = list(range(processes(layout)))
    return ranks if "RLOOP_EVERY_RANK" in os.environ else sorted({*ranks[:: len(ranks) // layout.pp], ranks[-1]})


def test_shipped_experiments_at_every_coordinate() -> None:
    experiments = shipped()
    sizes = megatron_sizes([job | {"ranks": some_ranks(config.layout)} for job, config in experiments.values()])
    for (name, (job, config)), theirs in zip(experiments.items(), sizes, strict=True):
        model = Architecture.of(job["architecture"], name)
        for rank, held in zip(some_ranks(config.layout), theirs, strict=True):
            ours = vars(state_of(model, config, coordinates(rank, config.layout)))
            assert {key: ours[key] for key in held} == held, f"{name}, rank {rank}"
        print(f"{name}: {len(theirs)} ranks, the fullest has {max(theirs, key=lambda held: sum(held.values()))}")


QWEN_7B = Architecture(28, 3584, 28, 4, 128, 18944, 152064, 32768, qkv_bias=True)
QWEN_30B = Architecture(48, 2048, 32, 4, 128, 6144, 151936, 40960, qk_norm=True, experts=128, top_k=8, expert_ffn=768)


def test_published_numbers_of_parameters() -> None:
    assert total_parameters(QWEN_7B)["total"] == 7_615_616_512  # the Hub's count of Qwen2.5-7B
    assert total_parameters(QWEN_30B)["total"] == 30_532_122_624  # of Qwen3-30B-A3B
    assert 3.3e9 < total_parameters(QWEN_30B)["active"] < 3.4e9


def test_options_of_the_optimizer() -> None:
    """Bytes of an element: main weight and two moments of 4, 2 where they are bf16; the offloaded share takes none."""
    plain = state_of(QWEN_7B, Config(), Coordinates(0))
    assert plain.optimizer == 12 * plain.parameters
    aware = state_of(QWEN_7B, Config(actor=ActorConfig(precision_aware_optimizer=True)), Coordinates(0))
    assert aware.optimizer == 8 * plain.parameters
    half = state_of(QWEN_7B, Config(actor=ActorConfig(optimizer_offload=0.5)), Coordinates(0))
    assert half.optimizer == plain.optimizer / 2
    assert half.host == plain.parameters / 2 * 16  # pinned gradients too


def test_fp8_keeps_two_copies_of_the_layers_matrices() -> None:
    plain = state_of(QWEN_7B, Config(), Coordinates(0))
    matrices = 28 * (3584 * (3584 + 2 * 512) + 3584 * 3584 + 3 * 3584 * 18944)
    fp8 = state_of(QWEN_7B, Config(precision="fp8_tensorwise"), Coordinates(0))
    assert fp8.weights - plain.weights == 2 * matrices
    some = state_of(QWEN_7B, Config(precision="fp8_tensorwise", fp8=Fp8Config(first_bf16_layers=7)), Coordinates(0))
    assert some.weights - plain.weights == 2 * matrices * 21 // 28
    gather = Config(precision="fp8_tensorwise", fp8=Fp8Config(parameter_gather=True))
    assert state_of(QWEN_7B, gather, Coordinates(0)).weights == plain.weights
