from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rloop_mcore.config import LayoutConfig
from rloop_mcore.errors import UserError
from rloop_mcore.planning.architecture import Architecture
from rloop_mcore.planning.layouts import broken_rule, nearest_legal, overrides, processes, stages


def sized(layers: int, heads: int, kv_heads: int, ffn: int, experts: int = 0, expert_ffn: int = 0) -> Architecture:
    """A model of these sizes; what a layout does not look at is any."""
    return Architecture(layers, 896, heads, kv_heads, 64, ffn, 151936, 0, experts=experts, expert_ffn=expert_ffn)


QWEN_HALF_B = sized(layers=24, heads=14, kv_heads=2, ffn=4864)
QWEN_7B = sized(layers=28, heads=28, kv_heads=4, ffn=18944)
QWEN_30B = sized(layers=48, heads=32, kv_heads=4, ffn=6144, experts=128, expert_ffn=768)

BROKEN = [
    (QWEN_HALF_B, {"tp": 3}, "layout.tp=3 does not divide num_attention_heads=14"),
    (QWEN_HALF_B, {"tp": 7}, "layout.tp=7 does not divide num_key_value_heads=2"),
    (sized(4, 8, 8, ffn=100), {"tp": 8}, "layout.tp=8 does not divide intermediate_size=100"),
    (QWEN_7B, {"sp": True}, "layout.sp=true needs layout.tp above 1"),
    (QWEN_7B, {"ep": 2, "dp": 2}, "layout.ep=2 needs a model with experts"),
    (QWEN_7B, {"etp": 2, "tp": 2}, "layout.etp=2 needs a model with experts"),
    (QWEN_30B, {"ep": 3, "dp": 3}, "layout.ep=3 does not divide the number of experts=128"),
    (QWEN_30B, {"etp": 5, "dp": 5}, "layout.etp=5 does not divide the experts' intermediate size=768"),
    (
        QWEN_30B,
        {"ep": 4, "etp": 2, "dp": 4, "pp": 2},
        "layout.ep=4 x layout.etp=2 does not divide the 4 processes of a pipeline stage (tp x cp x dp)",
    ),
    (QWEN_30B, {"tp": 2}, "layout.tp=2 of a model with experts needs layout.sp=true"),
    (QWEN_7B, {"vpp": 2}, "layout.vpp=2 needs layout.pp above 1"),
    (QWEN_7B, {"pp": 8, "vpp": 4}, "layout.pp=8 x layout.vpp=4 makes 32 stages of num_hidden_layers=28"),
    (
        QWEN_7B,
        {"pp": 2, "vpp": 2, "stages": [14, 14]},
        "layout.stages=[14,14] has 2 stages and layout.pp=2 x layout.vpp=2 is 4",
    ),
    (QWEN_7B, {"pp": 2, "stages": [14, 13]}, "layout.stages=[14,13] has 27 layers and num_hidden_layers is 28"),
    (
        QWEN_7B,
        {"pp": 3, "stages": [14, 0, 14]},
        "layout.stages=[14,0,14] has a stage without layers that isn't the first (embedding) or the last (loss)",
    ),
    (
        QWEN_7B,
        {"pp": 2, "stages": [29, -1]},
        "layout.stages=[29,-1] has a stage without layers that isn't the first (embedding) or the last (loss)",
    ),
]


@pytest.mark.parametrize(("model", "layout", "rule"), BROKEN)
def test_a_broken_rule_is_named_with_key_and_value(model: Architecture, layout: dict[str, Any], rule: str) -> None:
    assert broken_rule(LayoutConfig(**layout), model) == rule


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        (QWEN_HALF_B, {"tp": 2, "pp": 5, "cp": 3, "dp": 7, "sp": True}),
        (QWEN_7B, {"tp": 4, "pp": 4, "vpp": 7, "cp": 2, "dp": 8}),
        (QWEN_7B, {"pp": 3, "stages": [0, 28, 0]}),
        (QWEN_7B, {"stages": [28]}),
        (QWEN_30B, {"tp": 4, "pp": 4, "vpp": 3, "ep": 8, "etp": 2, "dp": 4, "sp": True}),
        (QWEN_30B, {"ep": 16, "cp": 4, "dp": 4}),
    ],
)
def test_a_legal_layout_stays_as_it_is(model: Architecture, layout: dict[str, Any]) -> None:
    assert broken_rule(LayoutConfig(**layout), model) is None
    assert nearest_legal(LayoutConfig(**layout), model) == LayoutConfig(**layout)


@pytest.mark.parametrize(
    ("model", "layout", "change"),
    [
        (QWEN_HALF_B, {"tp": 3, "dp": 2}, "layout.tp=2 layout.dp=3"),
        (QWEN_HALF_B, {"tp": 14}, "layout.tp=2 layout.dp=7"),
        (QWEN_7B, {"tp": 8, "dp": 64}, "layout.tp=4 layout.dp=128"),
        (QWEN_7B, {"pp": 32, "dp": 2}, "layout.pp=16 layout.dp=4"),
        (QWEN_7B, {"pp": 8, "vpp": 4}, "layout.vpp=3"),
        (QWEN_7B, {"tp": 4, "ep": 4}, "layout.ep=1"),
        (QWEN_7B, {"pp": 4, "stages": [7, 7, 7]}, "layout.stages=[]"),
        (QWEN_7B, {"pp": 4, "vpp": 3, "stages": [4, 4, 4, 4, 4, 3, 3, 2]}, "layout.vpp=2"),
        (QWEN_30B, {"tp": 4, "dp": 2, "ep": 8}, "layout.sp=true"),
        (QWEN_30B, {"tp": 8, "sp": True, "ep": 8, "dp": 8}, "layout.tp=4 layout.dp=16"),
        (QWEN_30B, {"ep": 12, "dp": 16}, "layout.ep=16"),
        (QWEN_30B, {"etp": 2}, "layout.etp=1"),
    ],
)
def test_the_nearest_legal_layout(model: Architecture, layout: dict[str, Any], change: str) -> None:
    wanted = LayoutConfig(**layout)
    assert " ".join(overrides("layout", wanted, nearest_legal(wanted, model))) == change


SMALL = st.sampled_from([1, 2, 3, 4, 6, 8])
MODELS = st.builds(
    sized,
    layers=st.integers(1, 30),
    heads=st.sampled_from([4, 6, 12, 14, 16]),
    kv_heads=st.sampled_from([1, 2, 4, 6]),
    ffn=st.sampled_from([24, 100, 4864]),
    experts=st.sampled_from([0, 0, 6, 8]),
    expert_ffn=st.sampled_from([24, 100]),
)
STAGES = st.one_of(st.just([]), st.lists(st.integers(-1, 5), min_size=1, max_size=6))
LAYOUTS = st.builds(
    LayoutConfig,
    tp=SMALL,
    pp=SMALL,
    vpp=SMALL,
    cp=SMALL,
    ep=SMALL,
    etp=SMALL,
    dp=SMALL,
    sp=st.booleans(),
    stages=STAGES,
)


@given(LAYOUTS, MODELS)
@settings(max_examples=300)
def test_the_nearest_legal_layout_is_legal_and_of_as_many_processes(layout: LayoutConfig, model: Architecture) -> None:
    found = nearest_legal(layout, model)
    assert broken_rule(found, model) is None
    assert processes(found) == processes(layout)
    if broken_rule(layout, model) is None:
        assert found == layout


KEYS = ("tp", "pp", "vpp", "cp", "ep", "etp", "dp", "stages")


def changes(before: LayoutConfig, after: LayoutConfig) -> int:
    return sum(getattr(before, key) != getattr(after, key) for key in KEYS)


@given(LAYOUTS.filter(lambda layout: processes(layout) <= 24), MODELS)
@settings(max_examples=20)
def test_no_legal_layout_changes_fewer_keys(layout: LayoutConfig, model: Architecture) -> None:
    total, fewest = processes(layout), changes(layout, nearest_legal(layout, model))
    sizes = [n for n in range(1, total + 1) if total % n == 0]
    for tp, pp, cp in product(sizes, sizes, sizes):
        if total % (tp * pp * cp):
            continue
        split = replace(layout, tp=tp, pp=pp, cp=cp, dp=total // (tp * pp * cp))
        rest = product(
            {1, layout.vpp, 2, 3, 5}, {1, 2, 3, 4, 6, 8}, {1, 2, 3, 4, 5}, (False, True), ([], layout.stages)
        )
        for vpp, ep, etp, sp, chosen in rest:
            other = replace(split, vpp=vpp, ep=ep, etp=etp, sp=sp, stages=chosen)
            if changes(layout, other) < fewest:
                assert broken_rule(other, model) is not None, other


@pytest.mark.parametrize(
    ("layout", "layers", "expected"),
    [
        (LayoutConfig(), 24, [24]),
        (LayoutConfig(pp=4), 28, [7, 7, 7, 7]),
        (LayoutConfig(pp=2, vpp=2), 8, [2, 2, 2, 2]),
        (LayoutConfig(pp=4), 10, [2, 3, 3, 2]),
        (LayoutConfig(pp=8), 28, [2, 4, 4, 4, 4, 4, 4, 2]),
        (LayoutConfig(pp=4, vpp=2), 28, [2, 4, 4, 4, 4, 4, 4, 2]),
        (LayoutConfig(pp=2), 25, [13, 12]),
        (LayoutConfig(pp=3), 4, [1, 2, 1]),
        (LayoutConfig(pp=2, stages=[3, 7]), 10, [3, 7]),
    ],
)
def test_layers_of_the_stages(layout: LayoutConfig, layers: int, expected: list[int]) -> None:
    assert stages(layout, layers) == expected


@given(st.integers(1, 40), st.integers(2, 12))
def test_no_stage_of_an_uneven_split_works_a_layer_more_than_another(extra: int, pp: int) -> None:
    layers = pp + extra
    split = stages(LayoutConfig(pp=pp), layers)
    assert sum(split) == layers
    assert min(split) >= 1
    if layers % pp:
        work = [split[0] + 1, *split[1:-1], split[-1] + 1]
        assert max(work) == max(2, -(-(layers + 2) // pp))  # no split of the layers does better


def test_sizes_are_read_from_config_json() -> None:
    def read(**sizes: int) -> Architecture:
        fixed = {"hidden_size": 896, "head_dim": 64, "vocab_size": 151936}
        return replace(Architecture.of(fixed | sizes, "gpt2/config.json"), top_k=0)

    dense = {"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864}
    assert read(**dense) == QWEN_HALF_B
    experts = {"num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 6144}
    assert read(**experts, num_experts=128, moe_intermediate_size=768) == QWEN_30B
    mixtral = {"num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 64, "num_local_experts": 4}
    assert read(**mixtral) == sized(2, 8, 8, 64, 4, 64)
    with pytest.raises(UserError, match=r"gpt2/config.json has no num_hidden_layers"):
        read(n_layer=12)


TINY = sized(layers=4, heads=8, kv_heads=4, ffn=24)
TINY_EXPERTS = sized(layers=4, heads=8, kv_heads=4, ffn=24, experts=6, expert_ffn=20)
TRIED = [
    *((TINY, {"tp": tp}) for tp in (1, 2, 3, 4)),
    (sized(4, 8, 4, ffn=22), {"tp": 4}),
    (sized(4, 8, 6, ffn=24), {"tp": 4}),
    *((TINY, {"sp": True, "tp": tp}) for tp in (1, 2)),
    (TINY, {"ep": 2, "dp": 2}),
    *((TINY, {"vpp": 2, "pp": pp}) for pp in (1, 2)),
    (TINY, {"tp": 2, "pp": 2, "cp": 2, "dp": 3}),
    *((TINY, {"pp": 2, "stages": split}) for split in ([1, 3], [0, 4], [4, 0], [2, 1], [3, 2])),
    (TINY, {"pp": 2, "vpp": 2, "stages": [0, 3, 1, 0]}),
    (TINY, {"pp": 2, "vpp": 2, "stages": [2, 1, 1]}),
    *((TINY_EXPERTS, {"ep": ep, "dp": ep}) for ep in (2, 3, 4, 6)),
    *((TINY_EXPERTS, {"etp": etp, "dp": etp}) for etp in (2, 3, 4)),
    *((TINY_EXPERTS, {"ep": 2, "etp": 2, "pp": 2, "dp": dp}) for dp in (2, 4, 6)),
    (TINY_EXPERTS, {"ep": 2, "tp": 2}),
    (TINY_EXPERTS, {"ep": 2, "tp": 2, "sp": True}),
    (TINY_EXPERTS, {"ep": 2, "tp": 2, "cp": 3, "etp": 2, "sp": True}),
]


def test_megatron_refuses_and_takes_the_same_layouts() -> None:
    tried = [vars(replace(LayoutConfig(), **layout)) | {"model": vars(model)} for model, layout in TRIED]
    worker = Path(__file__).with_name("try_layouts.py")
    done = subprocess.run(
        [sys.executable, str(worker), json.dumps(tried)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    verdicts = json.loads(done.stdout.splitlines()[-1])
    for (model, layout), refusal in zip(TRIED, verdicts, strict=True):
        ours = broken_rule(LayoutConfig(**layout), model)
        assert (ours is None) == (refusal is None), f"{layout}: we say {ours!r}, Megatron {refusal!r}"
