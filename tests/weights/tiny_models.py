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
    from transformers import (
        AutoModelForCausalLM,
        LlamaConfig,
        Qwen2Config,
    )  # seconds that two_rank_bridge.py need not spend

    heads = kv_heads * ratio
    sizes = {
        "vocab_size": VOCABULARY,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        **overrides,
    }
    if family == "qwen2":
        config = Qwen2Config(hidden_size=heads * 8, **sizes)
    else:
        config = LlamaConfig(hidden_size=heads * 8, head_dim=16, rms_norm_eps=1e-5, **sizes)
    torch.manual_seed(sum(folder.name.encode()))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
    model.to(dtype).save_pretrained(folder)
    return model


def hf_tensors(model: torch.nn.Module, tied: bool) -> dict[str, torch.Tensor]:
    """The tensors a folder of `model` has to hold."""
    return {name: t for name, t in model.state_dict().items() if not (tied and name == "lm_head.weight")}


def some_ids() -> torch.Tensor:
    """Token ids [2, 17]."""
    return torch.randint(0, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(5))
