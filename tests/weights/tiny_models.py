"""Small random Hugging Face folders, made by transformers: the independent reference of these tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 61  # a prime: no tensor-parallel size divides it
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FAMILIES = {  # what a family's config has beside the common sizes
    "qwen2": lambda heads: {"hidden_size": heads * 8},
    "llama": lambda heads: {"hidden_size": heads * 8, "head_dim": 16, "rms_norm_eps": 1e-5},
    "mistral": lambda heads: {"hidden_size": heads * 8, "head_dim": 16, "sliding_window": None},
    "qwen3": lambda heads: {"hidden_size": 24, "head_dim": 8},
    "qwen3_moe": lambda heads: {
        "hidden_size": 24,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "norm_topk_prob": True,
    },
}


def make_folder(
    folder: Path,
    family: str,
    kv_heads: int,
    ratio: int,
    tied: bool,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> torch.nn.Module:
    """Write a model of `kv_heads * ratio` heads with random weights, norms and biases to `folder`; returns it."""
    from transformers import AutoConfig, AutoModelForCausalLM  # seconds that bridge_ranks.py need not spend

    heads = kv_heads * ratio
    sizes = {
        "vocab_size": VOCABULARY,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        **FAMILIES[family](heads),
        **overrides,
    }
    config = AutoConfig.for_model(family, **sizes)
    torch.manual_seed(sum(folder.name.encode()))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
    model.to(dtype).save_pretrained(folder)
    return model


def some_ids() -> torch.Tensor:
    """Token ids [2, 17]."""
    return torch.randint(0, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(5))
