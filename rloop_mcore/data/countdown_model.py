"""The countdown task's untrained model: a random-initialised Qwen2 of 0.23 M parameters and its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from rloop_mcore.data.countdown import EOS, PAD, VOCABULARY
from rloop_mcore.platform.files import atomic_path

HIDDEN = 96
HEADS = 4
KV_HEADS = 2
LAYERS = 2
INTERMEDIATE = 288
INITIALIZER_RANGE = 0.02

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": len(VOCABULARY),
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "rope_theta": 10000.0,  # the older spelling, which SGLang and transformers < 5 read
    "initializer_range": INITIALIZER_RANGE,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "attention_dropout": 0.0,
    "eos_token_id": VOCABULARY.index(EOS),
    "pad_token_id": VOCABULARY.index(PAD),
    "dtype": "float32",
}

GENERATION_CONFIG = {
    "do_sample": True,
    "eos_token_id": VOCABULARY.index(EOS),
    "pad_token_id": VOCABULARY.index(PAD),
}

TOKENIZER_CONFIG = {
    "tokenizer_class": "Qwen2Tokenizer",
    "pad_token": PAD,
    "unk_token": PAD,  # never produced; without it Qwen2Tokenizer adds a 49th token
    "eos_token": EOS,
    "model_max_length": 64,
}


def tokenizer() -> Tokenizer:
    """One token a number or sign, in the form of Qwen2's own tokenizer.

    transformers opens a Qwen2 folder as Qwen2Tokenizer whatever its tokenizer.json holds, with a byte-level BPE that
    splits numbers into digits. So this is one as well, and the numbers above 9 are added tokens, which stay whole.
    """
    result = Tokenizer(models.BPE({token: number for number, token in enumerate(VOCABULARY)}, merges=[]))
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens([PAD, EOS])
    result.add_tokens([token for token in VOCABULARY if token.isdigit() and len(token) > 1])
    return result


def random_weights(seed: int) -> dict[str, np.ndarray]:
    """Qwen2's initialisation: N(0, INITIALIZER_RANGE) matrices, zero biases, unit norms; fp32, HF names."""
    kv = HIDDEN // HEADS * KV_HEADS
    layer = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (kv, HIDDEN),
        "self_attn.v_proj": (kv, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }
    matrices = {"model.embed_tokens": (len(VOCABULARY), HIDDEN), "lm_head": (len(VOCABULARY), HIDDEN)}
    norms = ["model.norm"]
    for number in range(LAYERS):
        matrices |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
        norms += [f"model.layers.{number}.{name}" for name in ("input_layernorm", "post_attention_layernorm")]
    draw = np.random.default_rng(seed)
    weights = {
        f"{name}.weight": draw.normal(0.0, INITIALIZER_RANGE, shape).astype(np.float32)
        for name, shape in matrices.items()
    }
    weights |= {f"{name}.weight": np.ones(HIDDEN, np.float32) for name in norms}
    with_bias = [name for name in matrices if name.endswith(("q_proj", "k_proj", "v_proj"))]
    weights |= {f"{name}.bias": np.zeros(matrices[name][0], np.float32) for name in with_bias}
    return weights


def write_model(folder: Path, seed: int) -> int:
    """Write the HF folder atomically, the same bytes for the same seed; returns the number of parameters."""
    weights = random_weights(seed)
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        # by Python: what the libraries' own writers raise on a full disk doesn't say that it is one
        (temporary / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
        (temporary / "tokenizer.json").write_text(tokenizer().to_str(pretty=True), encoding="utf-8")
        configs = {"config": CONFIG, "generation_config": GENERATION_CONFIG, "tokenizer_config": TOKENIZER_CONFIG}
        for name, content in configs.items():
            (temporary / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    return sum(weight.size for weight in weights.values())
