"""Whole models of the CPU's layer spec: a pack is its sequences one by one; recomputation changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from rloop_mcore import platform

platform.setup("cpu", threads=1)

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from naive_attention import cumulative  # noqa: E402

from rloop_mcore.platform.layer_spec import block_spec, transformer_settings  # noqa: E402

LENGTHS, VOCABULARY = [12, 12, 12, 7, 20], 32
EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 24,
    "moe_router_dtype": "fp32",
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
}


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def model(**fields: Any) -> GPTModel:
    """Two layers of random weights, the same for the same fields."""
    tensor_parallel.model_parallel_cuda_manual_seed(3)
    torch.manual_seed(3)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=48,
        ffn_hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        normalization="RMSNorm",
        activation_func=F.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **(transformer_settings() | fields),
    )
    return GPTModel(
        config,
        block_spec(config),
        vocab_size=VOCABULARY,
        max_sequence_length=64,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def run(policy: GPTModel, tokens: torch.Tensor, lengths: list[int] | None) -> torch.Tensor:
    """Logits [tokens, vocabulary] of one row, packed where `lengths` are given."""
    packing = None
    if lengths is not None:
        cu_seqlens = cumulative(lengths)
        packing = PackedSeqParams("thd", cu_seqlens, cu_seqlens, cu_seqlens, cu_seqlens, max(lengths), max(lengths))
    position_ids = torch.arange(len(tokens)).unsqueeze(0)  # rotary embedding goes by packing, not by these
    return policy(tokens.unsqueeze(0), position_ids, None, packed_seq_params=packing)[0]


def gradients(policy: GPTModel, logits: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    F.cross_entropy(logits, tokens, reduction="sum").backward()
    return {name: weight.grad for name, weight in policy.named_parameters()}


@pytest.mark.parametrize("fields", [{}, {"qk_layernorm": True} | EXPERTS], ids=["dense", "experts"])
def test_a_pack_is_its_sequences_one_by_one(fields: dict[str, Any]) -> None:
    tokens = torch.randint(VOCABULARY, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    packed_model, single_model = model(**fields), model(**fields)
    packed = run(packed_model, tokens, LENGTHS)
    single = torch.cat([run(single_model, sequence, None) for sequence in tokens.split(LENGTHS)])
    torch.testing.assert_close(packed, single, rtol=1e-5, atol=1e-5)
    ours, reference = gradients(packed_model, packed, tokens), gradients(single_model, single, tokens)
    for name, gradient in reference.items():
        assert gradient is not None
        assert (ours[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "selective"},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ],
    ids=["selective", "full"],
)
def test_recomputation_changes_no_gradient(recompute: dict[str, Any]) -> None:
    tokens = torch.randint(VOCABULARY, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    found = []
    for fields in ({}, recompute):
        policy = model(**fields)
        policy.train()
        found.append(gradients(policy, run(policy, tokens, LENGTHS), tokens))
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name


def test_experts_are_one_module_each() -> None:
    names = [name for name, _ in model(**EXPERTS).named_parameters()]
    assert "decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight" in names
    assert "decoder.layers.1.mlp.router.weight" in names


@pytest.mark.parametrize(
    ("fields", "norm"), [({}, "mlp.linear_fc1.layer_norm_weight"), (EXPERTS, "pre_mlp_layernorm.weight")]
)
def test_checkpoints_have_the_names_of_transformer_engines_modules(fields: dict[str, Any], norm: str) -> None:
    keys = {entry.key for entry in model(**fields).sharded_state_dict().values()}
    assert {key for key in keys if "norm" in key} == {
        "decoder.final_layernorm.weight",
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight",
        f"decoder.layers.{norm}",
    }
