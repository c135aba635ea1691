"""Qwen3-MoE: Qwen3 with a mixture of experts in every layer and no shared expert."""

from __future__ import annotations

from functools import partial
from typing import Any

from rloop_mcore.errors import UserError
from rloop_mcore.weights import decoder
from rloop_mcore.weights.family import Family, HfConfig, HfTensor, Parameter, Split

_HONOURED = decoder.HONOURED | {
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "shared_expert_intermediate_size": None,
}


def _architecture(config: HfConfig) -> dict[str, Any]:
    config.honour(_HONOURED)
    normalised = config.flag("norm_topk_prob")
    if normalised and config.size("num_experts_per_tok") == 1:
        raise UserError(
            f"{config.file}: norm_topk_prob with num_experts_per_tok 1 gives every expert the weight 1, and the router "
            "nothing to learn; set norm_topk_prob to false."
        )
    settings = decoder.architecture(config)
    settings["transformer"] |= {
        "qk_layernorm": True,
        "num_moe_experts": _experts(config),
        "moe_ffn_hidden_size": config.size("moe_intermediate_size"),
        "moe_router_topk": config.size("num_experts_per_tok", most=_experts(config)),
        "moe_router_pre_softmax": not normalised,  # a softmax over the top k is one over all, normalised to sum to 1
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
    }
    return settings


def _experts(config: HfConfig) -> int:
    """The number of experts: the hub's config files call it num_experts, transformers 5 writes num_local_experts."""
    return config.size("num_experts" if config.get("num_experts", None) else "num_local_experts")


def _mixture(config: HfConfig, mcore: str, hf: str) -> list[Parameter]:
    hidden, experts = config.size("hidden_size"), _experts(config)
    found = [Parameter(f"{mcore}.router.weight", (HfTensor(f"{hf}.gate.weight", (experts, hidden)),), Split.REPLICATED)]
    for expert in range(experts):
        names = f"{mcore}.experts.local_experts.{expert}", f"{hf}.experts.{expert}"
        found += decoder.swiglu(*names, hidden, config.size("moe_intermediate_size"), expert=True)
    return found


_parameters = partial(decoder.parameters, qk_norm=True, mlp=_mixture)
FAMILY = Family("qwen3_moe", "Qwen3MoeForCausalLM", _architecture, _parameters)
