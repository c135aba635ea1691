"""Cross-checks that run before anything starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rloop_mcore import validate
from rloop_mcore.compose import load_config
from rloop_mcore.errors import UserError
from rloop_mcore.hf_config import read_hf_config
from rloop_mcore.planning.nodes import check_gpus
from rloop_mcore.validate import check_device, check_model, check_values, warnings

NEEDED = ["run.dir=r", "model.path=m", "data.train=d"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("algorithm.group_size=1", ["algorithm.group_size=1", "2"]),
        ("algorithm.iterations=-1", ["algorithm.iterations=-1"]),
        ("algorithm.iterations=0", ["algorithm.iterations=0", "sft.demonstrations"]),
        ("algorithm.dual_clip=0.5", ["algorithm.dual_clip=0.5"]),
        ("algorithm.updates_per_step=100000", ["algorithm.updates_per_step=100000", "8192"]),
        ("algorithm.sampled_per_step=1", ["algorithm.prompts_per_step=512", "3"]),
        ("algorithm.hard_threshold=0", ["algorithm.hard_threshold=0"]),
        ("algorithm.overlong_buffer=2048", ["algorithm.overlong_buffer=2048", "rollout.max_tokens=2048"]),
        ("evaluation.k=[64]", ["evaluation.k", "64", "32"]),
        ("layout.tp=0", ["layout.tp=0"]),
        ("layout.etp=-2", ["layout.etp=-2"]),
        ("optimizer.schedule=linear", ["optimizer.schedule=linear", "cosine"]),
        ("optimizer.lr=0", ["optimizer.lr=0"]),
        ("precision=fp16", ["precision=fp16", "bf16"]),
        ("fp8.first_bf16_layers=-1", ["fp8.first_bf16_layers=-1"]),
        ("fp8.last_bf16_layers=-2", ["fp8.last_bf16_layers=-2"]),
        ("rollout.engine=sglang", ["rollout.python", "make install-sglang", "rollout.endpoints"]),
        ("rollout.engines=0", ["rollout.engines=0"]),
        ("rollout.endpoints=[http://127.0.0.1:30000]", ["rollout.endpoints", "rollout.engine=sglang"]),
        ("run.seed=-1", ["run.seed=-1"]),
        ("layout.tp=10000000", ["layout.* has 10000000 processes", "1000000"]),
        ("run.dir=''", ["run.dir"]),
        ("optimizer.beta1=1.5", ["optimizer.beta1=1.5"]),
        ("optimizer.lr=nan", ["optimizer.lr=nan", "finite"]),
        ("rollout.temperature=0", ["rollout.temperature=0"]),
        ("rollout.top_p=1.5", ["rollout.top_p=1.5"]),
        ("rollout.mismatch_gate=-1", ["rollout.mismatch_gate=-1", "null"]),
        ("data.limit=0", ["data.limit=0", "null"]),
        ("evaluation.k=[]", ["evaluation.k=[]", "pass@k"]),
        ("cluster.device=tpu", ["cluster.device=tpu", "cuda"]),
        ("reward.answer_format=xml", ["reward.answer_format=xml", "boxed"]),
        ("reward.wrong=1", ["reward.correct=1.0 must be above reward.wrong=1.0"]),
        ("reward.correct=inf", ["reward.correct=inf", "finite"]),
        ("reward.format_penalty=-0.5", ["reward.format_penalty=-0.5", "negative"]),
        ("reward.max_unparsable_share=0", ["reward.max_unparsable_share=0.0", "above 0"]),
        ("algorithm.aggregation=mean", ["algorithm.aggregation=mean", "token_mean"]),
        ("algorithm.advantage=gae", ["algorithm.advantage=gae", "group_std"]),
        ("algorithm.kl_estimator=k4", ["algorithm.kl_estimator=k4", "k3"]),
        ("algorithm.importance=truncate", ["algorithm.importance=truncate", "algorithm.old_logprobs=trainer"]),
        ("checkpoint.policy_steps=[0]", ["checkpoint.policy_steps holds 0", "algorithm.rl_steps=200"]),
        ("checkpoint.policy_steps=[20,201]", ["checkpoint.policy_steps holds 201"]),
        ("checkpoint.keep_best=3", ["checkpoint.keep_best=3", "data.validation"]),
        ("checkpoint.keep_best=-1", ["checkpoint.keep_best=-1"]),
        ("cluster.stop_margin_s=-1", ["cluster.stop_margin_s=-1"]),
        ("algorithm.importance_cap=0.5", ["algorithm.importance_cap=0.5"]),
        ("actor.optimizer_offload=1.5", ["actor.optimizer_offload=1.5"]),
        ("preflight.slow_link=50", ["preflight.slow_link=50.0", "from 0", "to 1"]),
        ("preflight.slow_link=-0.1", ["preflight.slow_link=-0.1"]),
        ("guard.policy=ignore", ["guard.policy=ignore", "end_phase"]),
        ("guard.patience=0", ["guard.patience=0"]),
        ("guard.entropy_low=-0.1", ["guard.entropy_low=-0.1", "null"]),
        ("guard={entropy_low: 2, entropy_high: 1}", ["guard.entropy_low=2", "guard.entropy_high=1"]),
        ("cluster.gpu.memory_gib=-1", ["cluster.gpu.memory_gib=-1", "negative"]),
        ("cluster.gpu.network_gb_s=-5", ["cluster.gpu.network_gb_s=-5"]),
        ("model.architecture.hidden_size=-5", ["model.architecture.hidden_size=-5"]),
        ("model.architecture.model_type=gpt2", ["model.architecture.model_type=gpt2", "qwen2, qwen3"]),
        ("cluster.collective_timeout_s=1e10", ["cluster.collective_timeout_s=1e+10", "1e+08 seconds"]),
        ("rft.max_per_problem=99999999999999999999", ["rft.max_per_problem=99999999999999999999", "2147483647"]),
        ("reward.workers=100000", ["reward.workers=100000", "at most 1024"]),
        ("rollout.bucket_mib=100000000", ["rollout.bucket_mib=100000000", "at most 16384"]),
        ("rollout.temperature=1e-300", ["rollout.temperature=1e-300", "from 0.001 to 1000"]),
        ("rollout.temperature=1e30", ["rollout.temperature=1e+30", "from 0.001 to 1000"]),
        ("evaluation.temperature=1e-9", ["evaluation.temperature=1e-09", "from 0.001 to 1000"]),
        ("cluster.interface='ib0,ib1 '", ["cluster.interface='ib0,ib1 '", "ib0"]),
        ("cluster.interface=", ["cluster.interface is empty"]),
        ("data.train=", ["data.train is empty"]),
        ("data.validation=''", ["data.validation is empty"]),
        ("cluster.slurm.partition=' '", ["cluster.slurm.partition is empty"]),
        ("run.dir='caf\udce9'", ["run.dir='caf\\udce9'", "UTF-8"]),
        ("rollout.server_args=['\udce9']", ["rollout.server_args=", "UTF-8"]),
        ("algorithm.hard_threshold=1e-30", ["algorithm.hard_threshold=1e-30", "1e-06"]),
        ("rft.steps=[200,210]", ["rft.steps=[200, 210]", "0 to 199"]),
        ("rft.min_tokens=2049", ["rft.min_tokens=2049", "rollout.max_tokens=2048"]),
        ("rft.optimizer.skip_grad=0", ["rft.optimizer.skip_grad=0", "null"]),
    ],
)
def test_an_impossible_value_is_refused_by_its_key(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        check_values(load_config([*NEEDED, override]))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize("key", ["max_lag=1", "endpoints=[http://127.0.0.1:30000]"])
def test_engines_that_cannot_sleep_are_refused_by_the_key_that_says_so(key: str) -> None:
    overrides = ["rollout.engine=sglang", f"rollout.python={sys.executable}", "rollout.sleep=true", f"rollout.{key}"]
    with pytest.raises(UserError, match=f"rollout.sleep=true with rollout.{key.partition('=')[0]}"):
        check_values(load_config([*NEEDED, *overrides]))


@pytest.mark.parametrize(
    ("endpoint", "word"),
    [
        ("localhost:30000", "http://"),
        ("http://user:word@localhost:30000", "RLOOP_ENGINE_KEY"),
        ("http://localhost:3000O", "http://HOST:PORT"),
        ("http://localhost:300000", "http://HOST:PORT"),
        ("http://[::1:30000", "http://HOST:PORT"),
    ],
)
def test_an_endpoint_that_cannot_be_used_is_refused(endpoint: str, word: str) -> None:
    with pytest.raises(UserError, match=word):
        check_values(load_config([*NEEDED, "rollout.engine=sglang", f"rollout.endpoints=['{endpoint}']"]))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollout.python=/no/such/python", ["rollout.python=/no/such/python", "make install-sglang"]),
        ("rollout.ep=3", ["rollout.ep=3", "rollout.tp=2"]),
        ("rollout.dp=3", ["rollout.dp=3", "rollout.tp=2"]),
        ("rollout.memory_fraction=1.5", ["rollout.memory_fraction=1.5"]),
        ("rollout.gpus=[0,0,1]", ["names 2 devices", "is 4"]),
        ("rollout.gpus=[-1,0,1,2]", ["rollout.gpus=[-1, 0, 1, 2]", "from 0 on"]),
    ],
)
def test_sglang_servers_that_cannot_be_started_are_refused(override: str, words: list[str]) -> None:
    base = ["rollout.engine=sglang", f"rollout.python={sys.executable}", "rollout.tp=2", "rollout.engines=2"]
    check_values(load_config([*NEEDED, *base]))
    with pytest.raises(UserError) as caught:
        check_values(load_config([*NEEDED, *base, override]))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollout.engine=embedded", ["rollout.engine=sglang"]),
        ("precision=fp32", ["precision=bf16"]),
        ("algorithm.old_logprobs=trainer", ["algorithm.importance=truncate"]),
    ],
)
def test_fp8_engines_that_cannot_be_or_are_not_corrected_for_are_refused(override: str, words: list[str]) -> None:
    base = ["rollout.engine=sglang", f"rollout.python={sys.executable}", "rollout.quantization=fp8", "precision=bf16"]
    base.append("algorithm.old_logprobs=engine")
    config = load_config([*NEEDED, *base])
    check_values(config)
    check_device(config, "cuda")
    with pytest.raises(UserError, match="on a GPU only"):
        check_device(config, "cpu")
    with pytest.raises(UserError) as caught:
        check_values(load_config([*NEEDED, *base, override]))
    assert all(word in str(caught.value) for word in ["rollout.quantization=fp8", *words]), str(caught.value)


def test_wandb_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb_project=loops needs wandb"):
        check_values(load_config([*NEEDED, "tracking.wandb_project=loops"]))


def test_the_defaults_are_legal() -> None:
    check_values(load_config(NEEDED))
    check_gpus(load_config(NEEDED))
    check_device(load_config([*NEEDED, "precision=fp32"]), "cuda")


@pytest.mark.parametrize(
    "overrides",
    [
        "algorithm.group_size=2 algorithm.prompts_per_step=4 algorithm.sampled_per_step=2 algorithm.sampling_rounds=2 "
        "algorithm.updates_per_step=8 algorithm.importance_cap=1 algorithm.dual_clip=0 rollout.max_tokens=16 "
        "algorithm.overlong_buffer=15 rft.min_tokens=16 evaluation.samples=8 evaluation.k=[1,8] algorithm.rl_steps=5 "
        "checkpoint.policy_steps=[1,5] rft.steps=[4,4] checkpoint.keep_best=1 data.validation=v run.seed=2147483647 "
        "actor.optimizer_offload=1 rft.share=1 optimizer.beta1=0",
        "algorithm.dual_clip=1.01 rft.steps=[0,0] run.seed=0 algorithm.iterations=0 sft.demonstrations=s "
        "rollout.engine=sglang rollout.python=/bin/sh rollout.tp=2 rollout.engines=2 rollout.dp=2 "
        "rollout.memory_fraction=0.99 rollout.gpus=[0,1,2,3]",
    ],
)
def test_the_last_legal_values_are_legal(overrides: str) -> None:
    check_values(load_config([*NEEDED, *overrides.split()]))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["layout.tp=4", "layout.dp=8"], ["32 processes", "16 GPUs", "cluster.nodes=2,"]),
        (["layout.tp=4", "layout.dp=4", "rollout.nodes=1"], ["16 processes", "8 GPUs", "2 - rollout.nodes=1"]),
        (["rollout.nodes=2"], ["rollout.nodes=2", "cluster.nodes=2"]),
        (["rollout=sglang_colocated", "rollout.engines=17"], ["rollout.engines=17", "17 GPUs", "cluster.nodes has 16"]),
        (["rollout=sglang_disaggregated", "rollout.engines=2", "rollout.tp=8"], ["16 GPUs", "rollout.nodes has 8"]),
    ],
)
def test_what_the_cluster_has_no_gpus_for_is_refused(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        check_gpus(load_config([*NEEDED, "cluster=h100_16", *overrides]))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["cluster=h100_16", "layout.tp=4", "layout.dp=4", "rollout=sglang_colocated", "rollout.engines=16"],
        ["cluster=h100_16", "layout.dp=8", "rollout=sglang_disaggregated", "rollout.engines=8"],
        ["cluster=cpu", "layout.dp=64"],
    ],
)
def test_what_the_cluster_has_gpus_for_is_not(overrides: list[str]) -> None:
    check_gpus(load_config([*NEEDED, *overrides]))


@pytest.mark.parametrize(
    ("overrides", "device", "word"),
    [
        (["actor.optimizer_offload=0.5"], "cpu", "needs a GPU"),
        (["actor.optimizer_offload=0.5", "actor.distributed_optimizer=false"], "cpu", "needs a GPU"),
        (["actor.precision_aware_optimizer=true"], "cpu", "Transformer Engine"),
        (["precision=fp8_tensorwise"], "cpu", "fp8.simulate=true"),
        (
            ["actor.precision_aware_optimizer=true", "actor.distributed_optimizer=false"],
            "cuda",
            "actor.distributed_optimizer=true",
        ),
        (["actor.optimizer_offload=0.5", "actor.distributed_optimizer=false"], "cuda", "distributed_optimizer=true"),
        (["actor.optimizer_offload=0.5", "actor.precision_aware_optimizer=true"], "cuda", "set one of the two"),
        (
            ["actor.precision_aware_optimizer=true", "precision=fp8_delayed", "fp8.parameter_gather=true"],
            "cuda",
            "precision_aware_optimizer=false",
        ),
        (["precision=fp32", "layout.cp=2"], "cuda", "layout.cp=1 or precision=bf16"),
        (["rollout.engine=sglang", "rollout.gpus=[0,1]"], "cuda", "refuses two ranks on one GPU: leave it empty"),
    ],
)
def test_what_a_device_cannot_do_is_refused(overrides: list[str], device: str, word: str) -> None:
    with pytest.raises(UserError, match=word):
        check_device(load_config([*NEEDED, *overrides]), device)


def model(folder: Path, **changes: object) -> None:
    shape = {
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "num_hidden_layers": 24,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "max_position_embeddings": 4096,
    }
    (folder / "config.json").write_text(json.dumps(shape | changes))


def test_a_cluster_of_which_half_is_idle_is_a_warning() -> None:
    half, all_of_it = (load_config([*NEEDED, "cluster=h100_16", f"layout.dp={dp}"]) for dp in (8, 16))
    assert any("8 of 16 GPUs" in warning and "layout.dp" in warning for warning in warnings(half, 17_000))
    assert not any("GPUs" in warning for warning in warnings(all_of_it, 17_000))
    assert not any("GPUs" in warning for warning in warnings(load_config(NEEDED), 17_000))


def test_layers_split_between_nodes_are_a_warning() -> None:
    four = [*NEEDED, "cluster=h100_16", "cluster.nodes=4", "layout.tp=4"]
    assert any("have 7 ranks each" in warning for warning in warnings(load_config([*four, "layout.dp=7"]), 17_000))
    assert not any("ranks" in warning for warning in warnings(load_config([*four, "layout.dp=8"]), 17_000))
    apart = load_config([*four, "layout.dp=7", "rollout.nodes=2"])
    assert any("have 14 ranks each" in warning for warning in warnings(apart, 17_000))


def test_keys_that_the_embedded_engine_does_not_heed_are_a_warning() -> None:
    given = [*NEEDED, "rollout.gpus=[1]", "rollout.memory_fraction=0.3"]
    (warning,) = warnings(load_config(given), 17_000)
    assert warning.startswith("rollout.memory_fraction=0.3, rollout.gpus=[1]: for rollout.engine=sglang only")
    assert warnings(load_config([*given, "rollout.engine=sglang"]), 17_000) == []


def test_a_nucleus_in_training_is_a_warning() -> None:
    (warning,) = warnings(load_config([*NEEDED, "rollout.top_p=0.9"]), 17_000)
    assert "rollout.top_p=0.9" in warning


def test_groups_that_nothing_is_learnt_from_are_a_warning() -> None:
    """An experiment's own sampled_per_step stays where algorithm=grpo is chosen over it."""
    grpo = [*NEEDED, "algorithm=grpo", "algorithm.prompts_per_step=16"]
    (warning,) = warnings(load_config([*grpo, "algorithm.sampled_per_step=32"]), 17_000)
    assert "algorithm.sampled_per_step=32" in warning
    assert "algorithm.prompts_per_step=16" in warning
    assert warnings(load_config(grpo), 17_000) == []
    assert warnings(load_config([*grpo, "algorithm.sampled_per_step=32", "rft.enabled=true"]), 17_000) == []


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ({"num_hidden_layers": 28}, ["model.architecture.num_hidden_layers=24", "says 28", "model="]),
        ({"tie_word_embeddings": False}, ["model.architecture.tie_word_embeddings=true", "says false"]),
        ({"hidden_size": 896, "head_dim": 128}, ["model.architecture.head_dim=64", "says 128"]),
        ({"hidden_size": 1792}, ["model.architecture.hidden_size=896", "says 1792"]),
        ({"model_type": "llama"}, ["model.architecture.model_type=qwen2", "says llama"]),
    ],
)
def test_another_model_than_the_chosen_one_is_refused(
    tmp_path: Path, file: dict[str, object], words: list[str]
) -> None:
    model(tmp_path, **file)
    check_model(load_config(NEEDED), tmp_path)
    with pytest.raises(UserError) as caught:
        check_model(load_config([*NEEDED, "model=qwen2.5_0.5b"]), tmp_path)
    assert all(word in str(caught.value) for word in [*words, str(tmp_path / "config.json")]), str(caught.value)


@pytest.mark.parametrize("size", ["hidden_size", "num_attention_heads"])
def test_a_size_that_is_a_text_is_refused(size: str, tmp_path: Path) -> None:
    model(tmp_path, **{size: "896"})
    with pytest.raises(UserError, match=rf"config\.json has no {size} above 0"):
        check_model(load_config(NEEDED), tmp_path)


def test_a_config_nested_without_end_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"config\.json is no JSON object"):
        check_model(load_config(NEEDED), tmp_path)


def test_a_release_may_have_other_positions_than_its_size_and_leave_sizes_out(tmp_path: Path) -> None:
    model(tmp_path, max_position_embeddings=8192, rope_theta=5e6, rms_norm_eps=1e-5)
    check_model(load_config([*NEEDED, "model=qwen2.5_0.5b"]), tmp_path)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace("4864", "4865"))
    with pytest.raises(UserError, match="intermediate_size=4864"):
        check_model(load_config([*NEEDED, "model=qwen2.5_0.5b"]), tmp_path)


def test_transformers_5_calls_the_experts_local(tmp_path: Path) -> None:
    moe = {"model_type": "qwen3_moe", "num_local_experts": 64, "num_hidden_layers": 48, "intermediate_size": 6144}
    model(tmp_path, **moe, hidden_size=2048, num_attention_heads=32, num_key_value_heads=4, head_dim=128)
    with pytest.raises(UserError, match=r"num_experts=128 and .* says 64"):
        check_model(load_config([*NEEDED, "model=qwen3_30b_a3b"]), tmp_path)


def test_an_illegal_layout_names_its_rule_and_the_nearest_legal_one(tmp_path: Path) -> None:
    model(tmp_path)
    check_model(load_config([*NEEDED, "layout.tp=2", "layout.pp=5"]), tmp_path)
    with pytest.raises(UserError) as caught:
        check_model(load_config([*NEEDED, "layout.tp=3", "layout.dp=2"]), tmp_path)
    assert str(caught.value) == (
        f"layout.tp=3 does not divide num_attention_heads=14 (model {tmp_path}/config.json): the nearest legal layout "
        "of 6 processes has layout.tp=2 layout.dp=3."
    )


def test_routing_replay_needs_experts(tmp_path: Path) -> None:
    model(tmp_path)
    with pytest.raises(UserError, match="needs a model with experts"):
        check_model(load_config([*NEEDED, "actor.routing_replay=first_forward"]), tmp_path)


def test_a_config_json_that_holds_no_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"no JSON object \(it is \[1\]\)"):
        read_hf_config(tmp_path)


def test_a_model_without_the_sizes_a_layout_needs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"n_layer": 12}))
    with pytest.raises(UserError, match=r"config.json has no num_hidden_layers"):
        check_model(load_config(NEEDED), tmp_path)


def test_a_family_that_is_not_described_is_refused_before_anything_starts(tmp_path: Path) -> None:
    model(tmp_path, model_type="deepseek_v3")
    with pytest.raises(UserError, match=r"config.json: model_type is 'deepseek_v3'; supported are llama, .*qwen3_moe"):
        check_model(load_config(NEEDED), tmp_path)
    check_model(load_config([*NEEDED, "model.family=llama"]), tmp_path)


@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim", "num_experts", "max_position_embeddings"])
def test_a_word_for_a_size_is_refused_and_null_is_the_default(tmp_path: Path, key: str) -> None:
    model(tmp_path, **{key: None})
    check_model(load_config(NEEDED), tmp_path)
    model(tmp_path, **{key: "2"})
    with pytest.raises(UserError, match=f"config.json: {key} is '2'; it has to be a whole number"):
        check_model(load_config(NEEDED), tmp_path)


def test_an_engine_that_cannot_split_the_model_is_refused(tmp_path: Path) -> None:
    model(tmp_path, hidden_size=128, intermediate_size=256, vocab_size=99)
    overrides = ["rollout.engine=sglang", "rollout.tp=2", "rollout.dp=2"]
    check_model(load_config([*NEEDED, *overrides[:2]]), tmp_path)
    with pytest.raises(UserError, match=r"rollout.dp=2 copies the attention"):
        check_model(load_config([*NEEDED, *overrides]), tmp_path)


def test_lengths_beyond_the_positions_are_refused(tmp_path: Path) -> None:
    model(tmp_path, max_position_embeddings=2048)
    with pytest.raises(UserError, match=r"3072 is more than the 2048 positions"):
        check_model(load_config(NEEDED), tmp_path)


def test_a_model_path_without_config_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.path=.* holds no config.json: .* `hf download NAME"):
        check_model(load_config(NEEDED), tmp_path)


def test_a_phase_that_cannot_find_a_hard_success_is_warned_about() -> None:
    few = load_config([*NEEDED, "algorithm.rl_steps=5", "algorithm.group_size=8"])
    (warning,) = warnings(few, problems=17_000)
    assert "at most 8 times" in warning
    assert "at least 11" in warning
    assert warnings(load_config(NEEDED), problems=17_000) == []
    assert warnings(load_config([*NEEDED, "algorithm.rl_steps=10", "rft.enabled=false"]), problems=17_000) == []
