"""The modules a Megatron transformer block is built of on this device."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from rloop_mcore import platform

_CPU_SETTINGS: dict[str, Any] = {
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
}


def transformer_settings() -> dict[str, Any]:
    """The TransformerConfig fields that this device asks for."""
    if platform.device().type == "cuda":
        return {"gradient_accumulation_fusion": False}  # it needs NVIDIA's apex
    return dict(_CPU_SETTINGS)


def block_spec(config: TransformerConfig) -> ModuleSpec | TransformerBlockSubmodules:
    """Transformer Engine's modules on CUDA; Megatron's local ones with our norm and core attention on the CPU."""
    if platform.device().type == "cuda":
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = CausalAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)


class RMSNorm(torch.nn.Module):
    """RMS norm in the parameters' dtype; Megatron's torch wrapper stays fp32 and refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., hidden_size] -> the same shape."""
        return F.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class CausalAttention(torch.nn.Module):
    """Causal core attention over torch's SDPA. Rows are padded on the right, so causality is the only mask needed."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        if config.context_parallel_size > 1:
            raise NotImplementedError("CausalAttention sees whole sequences: layout.cp must be 1 on the CPU")
        self.softmax_scale = softmax_scale

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **unused: Any
    ) -> torch.Tensor:
        """query [seq, batch, heads, head], key and value [seq, batch, groups, head] -> [seq, batch, heads * head]."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        context = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=query.size(1) != key.size(1)
        )
        return context.permute(2, 0, 1, 3).flatten(2)
