"""Engines, phases, whether a run fits, and what to change where it doesn't."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from rloop_mcore.config import ActorConfig, ClusterConfig, Config, DataConfig, GpuConfig, LayoutConfig, RolloutConfig
from rloop_mcore.errors import UserError
from rloop_mcore.planning.architecture import Architecture
from rloop_mcore.planning.engines import GIB, cache_bytes, check_engine, engine_plan, legal_engine_tp
from rloop_mcore.planning.layouts import broken_rule, processes
from rloop_mcore.planning.parameters import total_parameters
from rloop_mcore.planning.plan import Plan
from rloop_mcore.planning.search import changes, check_fit, legal_layouts, nearest_fit, ranked
from rloop_mcore.planning.time import efficiency

H100 = GpuConfig("H100", 79.1, 3350, 989, 450, 50)
QWEN_7B = Architecture(28, 3584, 28, 4, 128, 18944, 152064, 32768, qkv_bias=True)
QWEN_72B = Architecture(80, 8192, 64, 8, 128, 29568, 152064, 32768, qkv_bias=True)
QWEN_30B = Architecture(48, 2048, 32, 4, 128, 6144, 151936, 40960, qk_norm=True, experts=128, top_k=8, expert_ffn=768)


def run_on(machines: int, layout: LayoutConfig, **rollout: Any) -> Config:
    engines = {"engine": "sglang", "engines": machines, "tp": 8, "sleep": True, "memory_fraction": 0.4} | rollout
    return Config(
        layout=layout,
        cluster=ClusterConfig(device="cuda", nodes=machines, gpus_per_node=8, gpu=H100),
        rollout=RolloutConfig(**engines),
        data=DataConfig(train="t"),
    )


SMALL = run_on(1, LayoutConfig(tp=4, dp=2, sp=True), engines=8, tp=1)
LARGE = run_on(8, LayoutConfig(tp=8, pp=4, dp=2, sp=True))


_MEASURE_A_CHECKSUM = """
import re, torch
from pathlib import Path
from rloop_mcore.rollout.hashers import TileHasher

def resident(what):
    return int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

weights = torch.zeros(2**27, dtype=torch.uint8)
weights += 1  # the memory is there
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
before = resident("VmRSS")
TileHasher().update(weights)
print(resident("VmHWM") - before)
"""


def test_a_sync_has_the_memory_that_sglangs_checksums_take() -> None:
    planned, embedded = (
        Plan.of(QWEN_7B, replace(SMALL, rollout=replace(SMALL.rollout, engine=engine))).worst.phases["sync"]
        for engine in ("sglang", "embedded")
    )
    taken = int(subprocess.run([sys.executable, "-c", _MEASURE_A_CHECKSUM], check=True, capture_output=True).stdout)
    assert planned["weight_sync"] - embedded["weight_sync"] == pytest.approx(taken, rel=0.05)
    assert embedded["weight_sync"] == 2 * 152064 * 3584 * 2  # two buckets, each of the embedding


def test_cache_of_an_engine() -> None:
    """Qwen2.5-7B in bf16: 28 layers x 4 heads of 128, keys and values; the weights first."""
    assert cache_bytes(QWEN_7B, 1, 2) == 2 * 28 * 4 * 128 * 2
    assert cache_bytes(QWEN_7B, 8, 2) == 2 * 28 * 1 * 128 * 2  # a head is copied
    engine = engine_plan(QWEN_7B, SMALL, 80 * GIB)
    assert engine.weights == total_parameters(QWEN_7B)["total"] * 2
    assert engine.tokens == (int(0.4 * 80 * GIB) - engine.weights) // 57344
    assert engine.shared
    assert engine.sleeps


def test_an_engine_in_fp8_has_half_the_weights_and_a_larger_cache() -> None:
    """Of Qwen2.5-7B all but embedding, output layer, norms and biases: a byte a value and 4 for each 128 x 128."""
    fp8 = engine_plan(QWEN_7B, replace(SMALL, rollout=replace(SMALL.rollout, quantization="fp8")), 80 * GIB)
    matrices = 28 * 3584 * (3584 + 2 * 512 + 3584 + 3 * 18944)
    rest = total_parameters(QWEN_7B)["total"] - matrices
    assert fp8.weights == int(matrices * (1 + 4 / 128**2) + 2 * rest)
    assert fp8.tokens == (int(0.4 * 80 * GIB) - fp8.weights) // 57344


def test_data_parallel_attention_copies_the_attention_and_multiplies_the_cache() -> None:
    """Qwen3-30B-A3B over 8 GPUs in 4 groups: two GPUs share the 4 key/value heads of a token."""
    config = replace(SMALL, rollout=replace(SMALL.rollout, engines=1, tp=8, dp=4, ep=8))
    engine = engine_plan(QWEN_30B, config, 80 * GIB)
    attention = 48 * 2048 * 128 * (32 + 2 * 4 + 32) + 151936 * 2048
    assert engine.weights == (2 * total_parameters(QWEN_30B)["total"] + 2 * 3 * attention) // 8
    assert engine.tokens == 4 * (engine.cache // (2 * 48 * 2 * 128 * 2))


@pytest.mark.parametrize(
    ("model", "rollout", "words"),
    [
        (QWEN_7B, {"tp": 2, "dp": 2}, "rollout.dp=2"),
        (QWEN_30B, {"tp": 8, "quantization": "fp8"}, "moe_intermediate_size=768 over 8 GPUs"),
        (
            replace(QWEN_7B, kv_heads=2, head_dim=64),
            {"tp": 2, "quantization": "fp8"},
            "num_key_value_heads x head_dim=128",
        ),
    ],
)
def test_engines_that_sglang_cannot_split_are_refused(model: Architecture, rollout: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_engine(model, RolloutConfig(engine="sglang", **rollout))


@pytest.mark.parametrize(
    ("model", "rollout"),
    [
        (QWEN_7B, {"tp": 4, "quantization": "fp8"}),
        (QWEN_30B, {"tp": 8, "dp": 4, "ep": 8, "quantization": "fp8"}),
    ],
)
def test_engines_that_it_can_are_not(model: Architecture, rollout: dict[str, Any]) -> None:
    check_engine(model, RolloutConfig(engine="sglang", **rollout))


@pytest.mark.parametrize(
    ("rollout", "shared"),
    [
        ({"nodes": 1}, False),
        ({"gpus": [8, 9]}, False),
        ({"gpus": [0, 1]}, True),
        ({"endpoints": ["http://a:1"]}, False),
    ],
)
def test_engines_on_gpus_of_their_own(rollout: dict[str, Any], shared: bool) -> None:
    config = replace(SMALL, rollout=replace(SMALL.rollout, **rollout))
    assert engine_plan(QWEN_7B, config, 80 * GIB).shared == shared
    taken = Plan.of(QWEN_7B, config).worst.phases["rollout"]
    assert (taken["engine_weights"] > 0) == shared


def test_an_engine_that_sleeps_leaves_its_memory_to_the_update() -> None:
    asleep = Plan.of(QWEN_7B, SMALL)
    awake = Plan.of(QWEN_7B, replace(SMALL, rollout=replace(SMALL.rollout, sleep=False)))
    assert asleep.worst.phases["train"]["kv_cache"] == 0
    assert awake.worst.phases["train"]["kv_cache"] == awake.engine.cache
    assert asleep.worst.phases["rollout"] == awake.worst.phases["rollout"]
    assert asleep.fits
    assert not awake.fits


def test_parts_add_up_and_the_peak_is_the_largest_phase() -> None:
    for stage in Plan.of(QWEN_72B, LARGE).stages:
        assert stage.total == sum(stage.parts.values()) == max(sum(parts.values()) for parts in stage.phases.values())


def test_only_the_last_stage_has_logits_and_earlier_ones_hold_more_micro_batches() -> None:
    stages = Plan.of(QWEN_72B, LARGE).stages
    assert [bool(stage.phases["train"]["logits"]) for stage in stages] == [False, False, False, True]
    kept = [stage.phases["train"]["activations"] for stage in stages]
    assert kept == sorted(kept, reverse=True)


def test_no_memory_given_no_verdict() -> None:
    plan = Plan.of(QWEN_7B, Config(data=DataConfig(train="t")))
    assert plan.fits is None
    assert plan.times is None
    check_fit(plan)


def test_a_run_that_does_not_fit_is_refused_with_the_nearest_that_does() -> None:
    config = replace(LARGE, layout=LayoutConfig(tp=8, dp=8, sp=True))
    with pytest.raises(
        UserError, match=r"needs \d+\.\d GiB on a GPU of pipeline stage 0 and cluster.gpu.memory_gib=79"
    ):
        check_fit(Plan.of(QWEN_72B, config))
    nearest = nearest_fit(QWEN_72B, config)
    assert nearest is not None
    assert nearest.fits
    assert processes(nearest.config.layout) == 64
    fewest = keys_changed(config, nearest.config)
    for layout in legal_layouts(QWEN_72B, 64, 8):
        for recompute in ("none", "selective", "full"):
            other = replace(config, layout=layout, actor=replace(config.actor, recompute=recompute))
            if keys_changed(config, other) < fewest:
                assert not Plan.of(QWEN_72B, other).fits


def keys_changed(before: Config, after: Config) -> int:
    return sum("sp=" not in change for change in changes(before, after))


def test_too_few_gpus_for_any_layout() -> None:
    config = run_on(1, LayoutConfig(tp=8, sp=True))
    with pytest.raises(UserError, match=r"no layout of so many GPUs .8. does; \d+ would, with layout\."):
        check_fit(Plan.of(QWEN_72B, config))


def test_an_engine_without_room_for_a_sequence() -> None:
    config = replace(SMALL, rollout=replace(SMALL.rollout, memory_fraction=0.17))
    with pytest.raises(UserError, match=r"has room for 0 tokens beside its weights, and one sequence may have 3072"):
        check_fit(Plan.of(QWEN_7B, config))
    nearest = nearest_fit(QWEN_7B, config)
    assert nearest is not None
    assert changes(config, nearest.config) == [f"rollout.memory_fraction={nearest.config.rollout.memory_fraction}"]


def test_engines_too_narrow_for_the_weights() -> None:
    """72B in bf16 are 135 GiB: two GPUs of an engine's own can't hold them, four can."""
    config = run_on(
        9, LayoutConfig(tp=8, pp=4, dp=2, sp=True), nodes=1, engines=4, tp=2, sleep=False, memory_fraction=0.8
    )
    with pytest.raises(UserError, match=r"the nearest that fits has rollout.engines=2 rollout.tp=4"):
        check_fit(Plan.of(QWEN_72B, config))


@pytest.mark.parametrize(("model", "gpus"), [(QWEN_7B, 8), (QWEN_30B, 16), (QWEN_72B, 64)])
def test_search_ranks_legal_layouts(model: Architecture, gpus: int) -> None:
    plans = ranked(model, run_on(gpus // 8, LayoutConfig(dp=gpus)))
    assert all(broken_rule(plan.config.layout, model) is None for plan in plans)
    assert all(processes(plan.config.layout) == gpus for plan in plans)
    assert len({str(plan.config.layout) for plan in plans}) == len(plans)
    fitting = [plan for plan in plans if plan.fits]
    assert plans[: len(fitting)] == fitting
    seconds = [plan.times.step_s for plan in fitting if plan.times]
    assert fitting
    assert seconds == sorted(seconds)


def test_efficiency_goes_through_what_was_measured() -> None:
    assert [efficiency(width) for width in (100, 896, 1536, 3584, 10**5)] == [0.322, 0.322, 0.472, 0.525, 0.525]
    assert efficiency(1000) < efficiency(1200) < efficiency(1536)


def test_one_gpu_trains_at_the_measured_efficiency() -> None:
    """No communication, no bubble: all that is lost is the optimizer's step."""
    config = run_on(1, LayoutConfig(), engines=1, tp=1)
    plan = Plan.of(QWEN_7B, config)
    assert plan.times is not None
    assert 0.5 < plan.times.mfu < 0.525
    again = Plan.of(QWEN_7B, replace(config, actor=ActorConfig(recompute="full"))).times
    assert again is not None
    assert again.update_s / plan.times.update_s == pytest.approx(4 / 3, rel=0.05)


def test_a_pipeline_waits_and_the_network_costs() -> None:
    def update_s(**layout: Any) -> float:
        times = Plan.of(QWEN_7B, run_on(2, LayoutConfig(**layout))).times
        assert times is not None
        return times.update_s

    assert update_s(pp=4, dp=4) < update_s(pp=16)
    assert update_s(pp=4, vpp=2, dp=4) < update_s(pp=4, dp=4)
    cluster = ClusterConfig(nodes=2, gpus_per_node=8, gpu=replace(H100, network_gb_s=1))
    slow = replace(run_on(2, LayoutConfig(dp=16)), cluster=cluster)
    times = Plan.of(QWEN_7B, slow).times
    assert times is not None
    assert times.update_s > update_s(dp=16)


def test_an_engine_may_copy_key_and_value_heads() -> None:
    assert legal_engine_tp(QWEN_7B, 8) == [1, 2, 4]
    assert legal_engine_tp(QWEN_30B, 8) == [1, 2, 4, 8]
