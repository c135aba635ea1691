"""Engines, phases, whether a run fits, and what to change where it doesn't."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from rloop_mcore.config import ActorConfig, ClusterConfig, Config, DataConfig, GpuConfig, LayoutConfig, RolloutConfig
from rloop_mcore.errors import UserError
from rloop_mcore.planning import layouts
from rloop_mcore.planning.architecture import Architecture
from rloop_mcore.planning.engines import GIB, EnginePlan, cache_bytes, check_engine, engine_plan, legal_engine_tp
from rloop_mcore.planning.layouts import broken_rule, processes
from rloop_mcore.planning.parameters import total_parameters
from rloop_mcore.planning.plan import Plan
from rloop_mcore.planning.search import changes, check_fit, legal_layouts, nearest_fit, ranked
from rloop_mcore.planning.time import efficiency
from rloop_mcore.planning.workload import rows_of_update

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


def test_a_search_deals_layers_to_stages_once_a_number_of_stages() -> None:
    """The 94 layers of Qwen3-235B on 128 GPUs: anew for each stage of each layout it took minutes."""
    model = replace(QWEN_30B, layers=94, hidden=4096, heads=64, expert_ffn=1536)
    layouts._balanced.cache_clear()
    assert len(ranked(model, run_on(1, LayoutConfig(dp=8)), 128)) > 1000
    assert layouts._balanced.cache_info().misses <= 94


@pytest.mark.parametrize(("experts", "bytes_each"), [(128, 1), (384, 4)])
def test_an_update_has_the_choices_that_routing_replay_keeps(experts: int, bytes_each: int) -> None:
    """With 8 updates a step, 2,048 rows of up to 20,479 positions each: on each GPU, whatever dp is."""
    model = replace(QWEN_30B, experts=experts)
    layout = LayoutConfig(pp=2, dp=8, ep=8, stages=[23, 25])
    config = replace(run_on(2, layout, engines=4, tp=4, max_tokens=19456), data=DataConfig("t", max_prompt_tokens=1024))
    config.algorithm.prompts_per_step, config.algorithm.group_size, config.algorithm.updates_per_step = 1024, 16, 8
    replayed = replace(config, actor=replace(config.actor, routing_replay="first_forward"))
    for stage, layers in enumerate(layout.stages):
        before, after = (Plan.of(model, each).stages[stage].phases for each in (config, replayed))
        choices = 2048 * 20479 * layers * 8 * bytes_each
        assert after["train"]["activations"] - before["train"]["activations"] == choices
        assert after["rollout"] == before["rollout"]


def test_a_sync_has_the_memory_that_sglangs_checksums_take() -> None:
    def of(model: Architecture, engine: str) -> dict[str, int]:
        return Plan.of(model, replace(SMALL, rollout=replace(SMALL.rollout, engine=engine))).worst.phases["sync"]

    planned, embedded = (of(QWEN_7B, engine) for engine in ("sglang", "embedded"))
    taken = int(subprocess.run([sys.executable, "-c", _MEASURE_A_CHECKSUM], check=True, capture_output=True).stdout)
    assert planned["weight_sync"] - embedded["weight_sync"] == pytest.approx(taken, rel=0.05)
    assert embedded["weight_sync"] == 2 * 152064 * 3584 * 2  # two buckets, each of the embedding
    small = of(DENSE, "sglang")["weight_sync"] - of(DENSE, "embedded")["weight_sync"]
    assert small == 7 * 1024 * 128 * 2  # no more than the largest tensor is hashed at once


def test_cache_of_an_engine() -> None:
    """Qwen2.5-7B in bf16: 28 layers x 4 heads of 128, keys and values; the weights first."""
    assert cache_bytes(QWEN_7B, 1, 2) == 2 * 28 * 4 * 128 * 2
    assert cache_bytes(QWEN_7B, 8, 2) == 2 * 28 * 1 * 128 * 2  # a head is copied
    engine = engine_plan(QWEN_7B, SMALL, 80 * GIB)
    assert engine.weights == total_parameters(QWEN_7B)["total"] * 2
    assert engine.tokens == (int(0.4 * 80 * GIB) - engine.weights) // 57344
    assert engine.shared
    assert engine.sleeps


def test_the_embedded_engine_grows_to_whole_sequences() -> None:
    """On one GPU, which it shares, whatever rollout.tp is; a sequence has up to 1,024 + 2,048 tokens."""
    config = replace(SMALL, rollout=replace(SMALL.rollout, engine="embedded", tp=4, max_running=10))
    engine = engine_plan(QWEN_7B, config, 80 * GIB)
    tokens = 10 * 3072
    assert engine == EnginePlan(2 * QWEN_7B_WEIGHTS, tokens * 57344, GIB, tokens, shared=True, sleeps=False)


def test_an_engine_over_more_gpus_than_key_value_heads_copies_them() -> None:
    """Qwen2.5-7B over 28 GPUs: each has one of its 28 query heads, and one of its 4 key and value heads."""
    wide = engine_plan(QWEN_7B, replace(SMALL, rollout=replace(SMALL.rollout, tp=28)), 80 * GIB)
    copied = 28 * (3584 + 1) * 2 * 4 * 128 * (28 // 4 - 1)
    assert wide.weights == int(2 * (total_parameters(QWEN_7B)["total"] + copied) / 28)


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


def test_every_phase_holds_the_policy_as_megatron_does() -> None:
    stages = Plan.of(QWEN_72B, LARGE).stages
    sizes = [
        [tuple(parts[name] for name in ("weights", "gradients", "optimizer")) for parts in stage.phases.values()]
        for stage in stages
    ]
    assert all(len(of_stage) == 3 and len(set(of_stage)) == 1 for of_stage in sizes)
    assert max(of_stage[0] for of_stage in sizes) == (4_700_440_576, 9_400_881_152, 14_101_321_728)  # docs/planning.md


def test_what_a_sync_takes() -> None:
    """On the first stage, in two buckets; a matrix that is quantised is there in bf16 and three times in fp32."""

    def taken(model: Architecture = QWEN_7B, **rollout: Any) -> int:
        config = replace(SMALL, rollout=replace(SMALL.rollout, engine="embedded", **rollout))
        return Plan.of(model, config).worst.phases["sync"]["weight_sync"]

    assert taken(bucket_mib=4096) == 2 * 4 * GIB
    assert taken(quantization="fp8") - taken() == 3584 * 18944 * (2 + 3 * 4)
    assert taken(QWEN_30B, quantization="fp8") - taken(QWEN_30B) == 2048 * 32 * 128 * (2 + 3 * 4)
    stages = Plan.of(QWEN_72B, LARGE).stages
    assert [stage.phases["sync"]["weight_sync"] > 0 for stage in stages] == [True, False, False, False]


def test_what_cuda_and_the_allocator_take_is_beside_what_is_planned() -> None:
    phases = Plan.of(QWEN_7B, SMALL).worst.phases
    assert phases["rollout"]["runtime"] == 1.5 * GIB
    assert phases["sync"]["runtime"] == int(1.5 * GIB + 0.03 * phases["sync"]["weight_sync"])
    passing = phases["train"]["activations"] + phases["train"]["logits"]
    assert phases["train"]["runtime"] == int(1.5 * GIB + 0.03 * passing)
    on_cpu = Plan.of(QWEN_7B, replace(SMALL, cluster=replace(SMALL.cluster, device="cpu"))).worst.phases
    assert {parts["runtime"] for parts in on_cpu.values()} == {0}


@pytest.mark.parametrize(("engines", "stages_with"), [(2, 1), (3, 2), (8, 4)])
def test_engines_are_beside_the_stages_whose_gpus_they_are_on(engines: int, stages_with: int) -> None:
    """16 GPUs a stage, 8 an engine; asleep it keeps 1 GiB."""
    config = replace(LARGE, rollout=replace(LARGE.rollout, engines=engines))
    for number, stage in enumerate(Plan.of(QWEN_72B, config).stages):
        beside = number < stages_with
        of_engine = [stage.phases["rollout"][part] > 0 for part in ("engine_weights", "kv_cache", "engine_other")]
        assert of_engine == [beside] * 3
        assert stage.phases["train"]["engine_other"] == beside * GIB


def test_only_the_last_stage_has_logits_and_earlier_ones_hold_more_micro_batches() -> None:
    stages = Plan.of(QWEN_72B, LARGE).stages
    assert [bool(stage.phases["train"]["logits"]) for stage in stages] == [False, False, False, True]
    kept = [stage.phases["train"]["activations"] for stage in stages]
    assert kept == sorted(kept, reverse=True)


@pytest.mark.parametrize(("sp", "share"), [(False, 1), (True, 2)])
def test_a_stage_without_layers_keeps_its_outputs(sp: bool, share: int) -> None:
    """Of each of two micro-batches token ids, with a mask where tp > 1, and the embeddings in bf16, which sp shares."""
    config = run_on(1, LayoutConfig(tp=2, pp=2, sp=sp, stages=[0, 28]))
    kept = Plan.of(QWEN_7B, config).stages[0].phases["train"]["activations"]
    assert kept == 2 * 16384 * (8 + 1 + 2 * 3584 // share)


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


QWEN_7B_WEIGHTS = 7_615_616_512  # parameters
OUTPUT_7B = 152064 * 3584


def test_a_step_on_one_gpu_by_hand() -> None:
    """Two operations a weight and token, causal attention to half of 1,280 tokens; peak rates of docs/planning.md."""
    config = run_on(1, LayoutConfig(), engines=1, tp=1, memory_fraction=0.8, max_running=100, sleep=False)
    times = Plan.of(QWEN_7B, config).times
    assert times is not None
    tokens, share = 512 * (256 + 1024), 1024 / 1280  # of responses, which alone have logits
    operations = tokens * (2 * (QWEN_7B_WEIGHTS - 2 * OUTPUT_7B) + 2 * OUTPUT_7B * share + 2 * 28 * 1280 * 3584)
    forward = operations / (989e12 * 0.525)
    update = 3 * forward + 30 * QWEN_7B_WEIGHTS / 3350e9
    assert times.update_s == pytest.approx(update, rel=1e-3)
    assert times.train_s == pytest.approx(16 * update, rel=1e-3)
    assert times.mfu == pytest.approx(3 * operations / update / 989e12, rel=1e-3)
    assert times.train_tokens_per_s == pytest.approx(tokens / update, rel=1e-3)

    reads = 2 * QWEN_7B_WEIGHTS + 100 * (256 + 1024 / 2) * 57344  # of half a response on average
    token_s = reads / (0.7 * 3350e9) + 100 * 2 * QWEN_7B_WEIGHTS / (0.5 * 989e12) + 0.002
    assert times.rollout_tokens_per_s == pytest.approx(100 / token_s, rel=1e-3)
    prefill = 1024 * 256 * 2 * QWEN_7B_WEIGHTS / (0.5 * 989e12)
    rollout = 1024 * 16 * 1024 * token_s / 100 + prefill
    assert times.rollout_s == pytest.approx(rollout, rel=1e-3)
    sync = 2 * QWEN_7B_WEIGHTS / (0.75 * 450e9)
    assert times.sync_s == pytest.approx(sync, rel=1e-3)
    assert times.step_s == pytest.approx(times.train_s + times.rollout_s + times.sync_s)

    both = replace(config.algorithm, old_logprobs="trainer", kl_coefficient=0.1)
    ahead = replace(config, algorithm=both, rollout=replace(config.rollout, max_lag=1))
    later = Plan.of(QWEN_7B, ahead).times
    assert later is not None
    assert later.train_s - times.train_s == pytest.approx(16 * 2 * forward, rel=1e-3)
    assert later.step_s == pytest.approx(max(later.train_s, later.rollout_s) + later.sync_s)


def test_an_engine_over_two_gpus_by_hand() -> None:
    """Each has half of the weights and of the key/value heads; two all-reduces a layer, of 20 us."""
    config = run_on(1, LayoutConfig(), engines=4, tp=2, max_running=100)
    times = Plan.of(QWEN_7B, config).times
    assert times is not None
    reads = QWEN_7B_WEIGHTS + 100 * (256 + 1024 / 2) * 57344 / 2
    token_s = reads / (0.7 * 3350e9) + 100 * QWEN_7B_WEIGHTS / (0.5 * 989e12) + 0.002 + 2 * 28 * 20e-6
    assert times.rollout_tokens_per_s == pytest.approx(4 * 100 / token_s, rel=1e-3)
    prefill = 1024 * 256 * 2 * QWEN_7B_WEIGHTS / (0.5 * 989e12 * 8)
    assert times.rollout_s == pytest.approx(1024 * 16 * 1024 * token_s / 400 + prefill, rel=1e-3)


def test_a_round_takes_no_less_than_its_longest_response_alone() -> None:
    config = run_on(1, LayoutConfig(), engines=1, tp=1, memory_fraction=0.8)
    few = replace(config, algorithm=replace(config.algorithm, sampled_per_step=1, group_size=1))
    times = Plan.of(QWEN_7B, few).times
    assert times is not None
    token_s = (2 * QWEN_7B_WEIGHTS + 768 * 57344) / (0.7 * 3350e9) + 2 * QWEN_7B_WEIGHTS / (0.5 * 989e12) + 0.002
    assert times.rollout_s == pytest.approx(2048 * token_s, rel=1e-2)


def test_an_update_has_the_rows_of_the_phase_that_there_is() -> None:
    config = run_on(1, LayoutConfig())
    config.algorithm.prompts_per_step, config.algorithm.group_size, config.algorithm.updates_per_step = 5, 3, 2
    assert rows_of_update(config) == 8
    for key in ("iterations", "rl_steps", "updates_per_step"):
        fine_tuned = replace(config, algorithm=replace(config.algorithm, **{key: 0}))
        assert rows_of_update(fine_tuned) == config.rft.batch_size


DENSE = Architecture(2, 128, 4, 2, 32, 256, 1024, 4096)
EXPERTS = replace(DENSE, experts=4, top_k=2, expert_ffn=64)
TOKENS = 512 * 1280  # of an update: 40 micro-batches
ATTENTION = 2 * (2 * 128 + 2 * 128 * 128 + 128 * 128) + 128 + 2 * 1024 * 128  # and norms and embeddings: parameters
WEIGHTS = ATTENTION + 2 * 3 * 128 * 256
OF_EXPERTS = ATTENTION + 2 * (4 * 128 + 2 * 3 * 128 * 64)  # on a rank that has two of the four
HIDDEN = 2 * 128  # bytes of a token's hidden state


def without_work(model: Architecture, config: Config) -> float:
    """Seconds of an update where GPUs compute and read in no time; a link takes a GB a second, the network ten."""
    gpu = GpuConfig("fast", 80, 1e15, 1e15, node_gb_s=1 / 0.75, network_gb_s=0.1 / 0.75)
    times = Plan.of(model, replace(config, cluster=replace(config.cluster, gpu=gpu))).times
    assert times is not None
    return times.update_s


@pytest.mark.parametrize(
    ("model", "layout", "recompute", "expected"),
    [
        (DENSE, {}, "none", 0.0),
        # half of a gather or scatter of the hidden states, eight a layer; ten with sequence parallelism
        (DENSE, {"tp": 2}, "none", TOKENS * 2 * 8 * HIDDEN / 2),
        (DENSE, {"tp": 2}, "full", TOKENS * 2 * 12 * HIDDEN / 2),
        (DENSE, {"tp": 2, "sp": True}, "none", TOKENS * 2 * 10 * HIDDEN / 2),
        (DENSE, {"tp": 4}, "none", TOKENS * 2 * 8 * HIDDEN * 3 / 4),
        # each rank's keys and values once around forward, and with their gradients backward; gradients and weights
        (DENSE, {"cp": 2}, "none", TOKENS / 2 * 2 * 3 * 2 * (2 * 32) * 2 + (4 + 2) * WEIGHTS / 2),
        (DENSE, {"cp": 4}, "none", TOKENS / 4 * 2 * 3 * 2 * (2 * 32) * 2 * 3 + (4 + 2) * WEIGHTS * 3 / 4),
        (DENSE, {"dp": 2}, "none", (4 + 2) * WEIGHTS / 2),
        # to the next stage and back, the whole longer by the bubble
        (DENSE, {"pp": 2}, "none", TOKENS * 2 * HIDDEN * 41 / 40),
        # to the experts and back, forward and backward, of two copies of a token half
        (EXPERTS, {"ep": 2, "dp": 2}, "none", TOKENS / 2 * 2 * 4 * 2 * HIDDEN / 2 + (4 + 2) * OF_EXPERTS / 2),
        (EXPERTS, {"tp": 2, "sp": True}, "none", TOKENS * 2 * 5 * HIDDEN / 2),  # around the attention alone
        # a rank sends its own half of the tokens
        (DENSE, {"tp": 2, "sp": True, "pp": 2}, "none", TOKENS * (10 * HIDDEN / 2 + 2 * HIDDEN / 2) * 41 / 40),
        (EXPERTS, {"tp": 2, "sp": True, "ep": 2}, "none", TOKENS * 2 * (5 * HIDDEN / 2 + 4 * 2 * HIDDEN / 2 / 2)),
    ],
)
def test_communication_by_hand(model: Architecture, layout: dict[str, Any], recompute: str, expected: float) -> None:
    config = replace(run_on(1, LayoutConfig(**layout), engines=1, tp=1), actor=ActorConfig(recompute=recompute))
    assert without_work(model, config) * 1e9 == pytest.approx(expected, rel=2e-3, abs=1.0)


def test_what_is_within_a_node_takes_its_links() -> None:
    inside, across = (run_on(2, LayoutConfig(dp=dp), engines=1, tp=1) for dp in (8, 16))
    assert without_work(DENSE, inside) == pytest.approx((4 + 2) * WEIGHTS * 7 / 8 / 1e9, rel=2e-3)
    assert without_work(DENSE, across) == pytest.approx((4 + 2) * WEIGHTS * 15 / 16 / 1e8, rel=2e-3)


@pytest.mark.parametrize(("distributed", "share"), [(True, 1 / 2), (False, 1)])
def test_an_offloaded_optimizer_steps_at_the_rate_of_the_link_to_the_cpu(distributed: bool, share: float) -> None:
    config = run_on(1, LayoutConfig(dp=2), engines=1, tp=1)
    plain, half = (
        without_work(DENSE, replace(config, actor=ActorConfig(distributed_optimizer=distributed, optimizer_offload=o)))
        for o in (0.0, 0.5)
    )
    assert half - plain == pytest.approx(share * 0.5 * 30 * WEIGHTS / 25e9, rel=2e-3)


def arithmetic(model: Architecture, precision: str = "bf16", recompute: str = "none", **layout: Any) -> float:
    """The share of the bf16 peak that an update reaches where nothing but multiplications takes time."""
    gpu = replace(H100, memory_gb_s=1e15, node_gb_s=0)
    config = run_on(1, LayoutConfig(**layout), engines=1, tp=1)
    config = replace(config, precision=precision, cluster=replace(config.cluster, gpu=gpu))
    config = replace(config, actor=ActorConfig(recompute=recompute))
    times = Plan.of(model, config).times
    assert times is not None
    return times.mfu


def test_the_peak_share_is_that_of_the_matrices_that_a_gpu_has() -> None:
    """docs/planning.md: of the width, of width / sqrt(tp), of sqrt(width x expert width); measured for each recipe."""
    assert arithmetic(QWEN_7B) == pytest.approx(0.525)
    between = math.log(3584 / 2 / 1536) / math.log(3584 / 1536)
    assert arithmetic(QWEN_7B, tp=4) == pytest.approx(0.472 + (0.525 - 0.472) * between)
    between = math.log(math.sqrt(2048 * 768) / 896) / math.log(1536 / 896)
    assert arithmetic(QWEN_30B) == pytest.approx(0.322 + (0.472 - 0.322) * between)
    gains = {"fp8_delayed": 1.33, "fp8_tensorwise": 1.31, "fp8_blockwise": 1.21, "mxfp8": 1.21, "fp32": 0.5}
    assert {name: arithmetic(QWEN_7B, name) / 0.525 for name in gains} == pytest.approx(gains)


def test_the_slowest_stage_sets_the_pace_and_what_is_recomputed_is_no_progress() -> None:
    attention = 2 * 1280 * 3584  # operations of a token and layer
    layer = 2 * (3584 * (3584 + 2 * 512) + 3584 * 3584 + 3 * 3584 * 18944) + attention
    output = 2 * OUTPUT_7B * 1024 / 1280
    even, uneven = (arithmetic(QWEN_7B, pp=2, stages=stages) for stages in ([14, 14], [16, 12]))
    assert uneven / even == pytest.approx((14 * layer + output) / (16 * layer), rel=1e-3)
    forward = 28 * layer + output
    selective, full = (arithmetic(QWEN_7B, recompute=recompute) / 0.525 for recompute in ("selective", "full"))
    assert selective == pytest.approx(3 * forward / (3 * forward + 28 * attention))
    assert full == pytest.approx(3 * forward / (3 * forward + 28 * layer))


def test_engines_on_nodes_of_their_own_get_the_weights_over_the_network() -> None:
    times = Plan.of(QWEN_7B, run_on(2, LayoutConfig(), nodes=1, engines=1, tp=1)).times
    assert times is not None
    assert times.sync_s == pytest.approx(2 * QWEN_7B_WEIGHTS / (0.75 * 50e9), rel=1e-3)


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
