"""The modules a Megatron transformer block is built of on this device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from rloop_mcore import platform
from rloop_mcore.platform.attention import CausalAttention
from rloop_mcore.platform.cpu_kernels import RmsNormFunction

_CUDA_SETTINGS: dict[str, Any] = {
    "bias_activation_fusion": True,  # SwiGLU as one kernel that keeps its input only
    "apply_rope_fusion": True,  # Transformer Engine's kernel; otherwise packed sequences are a loop in Python
    "moe_permute_fusion": True,  # Transformer Engine >= 2.1; only layers with experts read it
}
_CPU_SETTINGS: dict[str, Any] = {
    "use_cpu_initialization": True,
    "bias_activation_fusion": True,  # cpu_kernels.swiglu
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
}


def transformer_settings() -> dict[str, Any]:
    """The TransformerConfig fields that this device asks for."""
    if platform.device().type == "cuda":
        return dict(_CUDA_SETTINGS)
    return dict(_CPU_SETTINGS)


def block_spec(config: TransformerConfig, vp_stage: int | None = None) -> ModuleSpec | TransformerBlockSubmodules:
    """Transformer Engine's modules on CUDA; Megatron's local ones with our norm and core attention on the CPU.

    Dense, or all layers with experts where `config.num_moe_experts` is set. `vp_stage`: the virtual pipeline stage.
    """
    experts = config.num_moe_experts
    if platform.device().type == "cuda":
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts, moe_grouped_gemm=experts is not None, qk_layernorm=config.qk_layernorm
        )
    layer = get_gpt_layer_local_spec(
        num_experts=experts, moe_grouped_gemm=False, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = CausalAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if experts is not None:  # Transformer Engine's modules have a fused norm in dense layers only
        del layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=RMSNorm)


def accumulate_in_gemms(chunks: Iterable[torch.nn.Module]) -> None:
    """Have Transformer Engine's GEMMs add a weight's gradient to its fp32 `main_grad`, without a bf16 one in between.

    By attribute: the setting of the configuration would reach Megatron's output layer too, which wants apex for it.
    """
    for module in (module for chunk in chunks for module in chunk.modules()):
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True  # type: ignore[assignment]


class RMSNorm(torch.nn.Module):
    """RMS norm with a weight in the parameters' dtype; Megatron's stays fp32 and refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., hidden_size] -> the same shape."""
        return RmsNormFunction.apply(hidden, self.weight, self.eps)
