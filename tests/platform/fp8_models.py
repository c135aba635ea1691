"""Small Megatron modules for the FP8 simulation: one linear layer, and a Qwen2-like or mixture-of-experts GPTModel."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig

LAYERS, HIDDEN, VOCABULARY, TOKENS = 4, 256, 160, 96


def _config(**fields: Any) -> TransformerConfig:
    return TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        add_bias_linear=False,
        **{"bias_activation_fusion": False} | fields,
    )


def linear(
    parallel: str,
    columns: int,
    rows: int,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    tp: int = 1,
    sequence_parallel: bool = False,
    is_expert: bool = False,
) -> Any:
    """A column- or row-parallel layer with weight [rows, columns], as Megatron's transformer layers build them."""
    torch.manual_seed(0)
    config = _config(params_dtype=dtype, tensor_model_parallel_size=tp, sequence_parallel=sequence_parallel)
    shared: dict[str, Any] = {
        "config": config,
        "bias": bias,
        "is_expert": is_expert,
        "init_method": torch.nn.init.normal_,
    }
    if parallel == "column":
        return ColumnParallelLinear(columns, rows, gather_output=False, skip_bias_add=False, **shared)
    return RowParallelLinear(columns, rows, input_is_parallel=True, skip_bias_add=False, **shared)


def gpt(experts: int | None = None, recompute: bool = False, seed: int = 0) -> GPTModel:
    """Random weights from `seed`."""
    torch.manual_seed(seed)
    fields: dict[str, Any] = {"ffn_hidden_size": 512}
    if experts:
        fields |= {"num_moe_experts": experts, "moe_router_topk": 2, "moe_ffn_hidden_size": 64}
    if recompute:
        fields |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    config = _config(
        num_query_groups=2,
        add_qkv_bias=True,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        **fields,
    )
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(
            num_experts=experts, moe_grouped_gemm=False, normalization="RMSNorm"
        ),
        vocab_size=VOCABULARY,
        max_sequence_length=TOKENS,
        position_embedding_type="rope",
        parallel_output=parallel_state.get_tensor_model_parallel_world_size() > 1,
    )


def loss_and_gradients(model: GPTModel, seed: int) -> dict[str, torch.Tensor]:
    """Next-token loss on random tokens: the logits as `out`, the gradients by parameter name."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (2, TOKENS), generator=generator)
    positions = torch.arange(TOKENS).expand_as(tokens)
    mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)[None, None]
    model.zero_grad()
    logits = model(tokens, positions, mask)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"out": logits.detach(), **gradients}
