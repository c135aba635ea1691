"""What the decoders share: grouped-query attention, RMS norms before attention and MLP, SwiGLU, rotary positions.

Imports no torch: what starts a run checks its model by this.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rloop_mcore.errors import UserError
from rloop_mcore.weights.family import HfConfig, HfTensor, Parameter, Split

HONOURED = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "quantization_config": None,
    "use_sliding_window": False,
    "is_causal": True,
    "per_layer_config": None,
    "text_config": None,
}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, config: HfConfig) -> Sizes:
        """Read config.json's. Raises UserError where one is missing."""
        hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
        kv_heads = config.size("num_key_value_heads", heads)
        if heads % kv_heads:
            raise UserError(
                f"{config.file}: num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}."
            )
        return cls(
            layers=config.size("num_hidden_layers", most=10_000),
            hidden=hidden,
            ffn=config.size("intermediate_size"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=config.size("head_dim", max(1, hidden // heads)),
            vocabulary=config.size("vocab_size"),
        )


def architecture(config: HfConfig) -> dict[str, Any]:
    """Megatron settings: `{"transformer": TransformerConfig fields, "gpt": GPTModel arguments}`."""
    sizes = Sizes.of(config)
    if (kinds := config.get("layer_types", None)) not in (None, ["full_attention"] * sizes.layers):
        raise UserError(
            f"{config.file}: layer_types is {kinds!r:.80}; only 'full_attention' for each of the {sizes.layers} layers "
            "is supported."
        )
    return {
        "transformer": {
            "num_layers": sizes.layers,
            "hidden_size": sizes.hidden,
            "ffn_hidden_size": sizes.ffn,
            "num_attention_heads": sizes.heads,
            "num_query_groups": sizes.kv_heads,
            "kv_channels": sizes.head_dim,
            "normalization": "RMSNorm",
            "layernorm_epsilon": config.positive("rms_norm_eps", config.get("rms_norm_eps", 1e-6)),
            "gated_linear_unit": True,
            "add_bias_linear": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        },
        "gpt": {
            "vocab_size": sizes.vocabulary,
            "max_sequence_length": config.size("max_position_embeddings"),
            "position_embedding_type": "rope",
            "share_embeddings_and_output_weights": config.flag("tie_word_embeddings"),
            **_rotary(config),
        },
    }


def dense_mlp(config: HfConfig, mcore: str, hf: str) -> list[Parameter]:
    """The dense MLP of a layer."""
    return swiglu(mcore, hf, config.size("hidden_size"), config.size("intermediate_size"))


def parameters(
    config: HfConfig,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    mlp: Callable[[HfConfig, str, str], list[Parameter]] = dense_mlp,
) -> list[Parameter]:
    """All parameters of the model, in the order of export.

    `mlp` gives those of a layer's MLP from the config and the MLP's names in Megatron and in the HF folder.
    """
    sizes = Sizes.of(config)
    embedding = HfTensor("model.embed_tokens.weight", (sizes.vocabulary, sizes.hidden))
    tied = config.flag("tie_word_embeddings")
    output = embedding if tied else HfTensor("lm_head.weight", embedding.shape)
    found = [Parameter("embedding.word_embeddings.weight", (embedding,), Split.VOCABULARY)]
    for layer in range(sizes.layers):
        mcore, hf = f"decoder.layers.{layer}", f"model.layers.{layer}"
        found += [
            norm(f"{mcore}.input_layernorm", f"{hf}.input_layernorm", sizes.hidden),
            *_attention(f"{mcore}.self_attention", f"{hf}.self_attn", sizes, qkv_bias, qk_norm),
            norm(f"{mcore}.pre_mlp_layernorm", f"{hf}.post_attention_layernorm", sizes.hidden),
            *mlp(config, f"{mcore}.mlp", f"{hf}.mlp"),
        ]
    return [
        *found,
        norm("decoder.final_layernorm", "model.norm", sizes.hidden),
        Parameter("output_layer.weight", (output,), Split.VOCABULARY, copy=tied),
    ]


def norm(mcore: str, hf: str, size: int) -> Parameter:
    """The weight of an RMS norm."""
    return Parameter(f"{mcore}.weight", (HfTensor(f"{hf}.weight", (size,)),), Split.REPLICATED)


def swiglu(mcore: str, hf: str, hidden: int, ffn: int, expert: bool = False) -> list[Parameter]:
    """Megatron's fused fc1 holds, on each tensor-parallel rank, its part of the gate and of the up projection."""
    gate, up = (HfTensor(f"{hf}.{name}.weight", (ffn, hidden)) for name in ("gate_proj", "up_proj"))
    down = HfTensor(f"{hf}.down_proj.weight", (hidden, ffn))
    return [
        Parameter(f"{mcore}.linear_fc1.weight", (gate, up), Split.OUTPUT, expert=expert),
        Parameter(f"{mcore}.linear_fc2.weight", (down,), Split.INPUT, expert=expert),
    ]


def _attention(mcore: str, hf: str, sizes: Sizes, qkv_bias: bool, qk_norm: bool) -> list[Parameter]:
    """Megatron's fused QKV holds, for one KV head after the other, its query heads, its key and its value."""
    rows = {"q_proj": sizes.heads, "k_proj": sizes.kv_heads, "v_proj": sizes.kv_heads}
    heads = {projection: count * sizes.head_dim for projection, count in rows.items()}
    weights = tuple(HfTensor(f"{hf}.{name}.weight", (n, sizes.hidden)) for name, n in heads.items())
    biases = tuple(HfTensor(f"{hf}.{name}.bias", (n,)) for name, n in heads.items())
    output = HfTensor(f"{hf}.o_proj.weight", (sizes.hidden, heads["q_proj"]))
    found = [Parameter(f"{mcore}.linear_qkv.weight", weights, Split.OUTPUT, groups=sizes.kv_heads)]
    if qkv_bias:
        found.append(Parameter(f"{mcore}.linear_qkv.bias", biases, Split.OUTPUT, groups=sizes.kv_heads))
    if qk_norm:
        found += [norm(f"{mcore}.{x}_layernorm", f"{hf}.{x}_norm", sizes.head_dim) for x in ("q", "k")]
    return [*found, Parameter(f"{mcore}.linear_proj.weight", (output,), Split.INPUT)]


def _rotary(config: HfConfig) -> dict[str, Any]:
    """GPTModel's rotary arguments. transformers 5 writes `rope_parameters`, older ones rope_theta and rope_scaling.

    Where a file has both, transformers 5 takes rope_scaling and older ones do too: they have to mean the same.
    """
    stated = [config.get(key, {}) for key in ("rope_parameters", "rope_scaling")]
    found = [_rotary_arguments(config, rope) for rope in stated if rope != {}] or [_rotary_arguments(config, {})]
    if found[0] != found[-1]:
        raise UserError(
            f"{config.file}: rope_parameters {stated[0]} and rope_scaling {stated[1]} differ: remove the one that is "
            "not meant."
        )
    return found[0]


def _rotary_arguments(config: HfConfig, rope: Any) -> dict[str, Any]:
    if not isinstance(rope, dict):
        raise UserError(f"{config.file}: the rotary parameters are {rope!r}; they have to be an object.")
    theta = rope.get("rope_theta", config.values.get("rope_theta", 10000.0))
    if by_layer := [key for key, value in rope.items() if isinstance(value, dict)]:
        raise UserError(f"{config.file}: rotary parameters by kind of layer ({by_layer[0]}) are not supported.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    arguments = {"rotary_base": config.positive("rope_theta", theta), "rotary_percent": 1.0}
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"{config.file}: partial_rotary_factor other than 1.0 is not supported.")
    if kind == "default":
        return arguments
    megatron = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if config.get("original_max_position_embeddings", 8192) != 8192:  # before the one in `rope`, for transformers 5
        rope = rope | {"original_max_position_embeddings": config["original_max_position_embeddings"]}
    if kind != "llama3" or "factor" not in rope or any(rope.get(key) != value for key, value in megatron.items()):
        raise UserError(
            f"{config.file}: rope scaling {dict(rope)} is not supported, only 'llama3' with low_freq_factor 1, "
            "high_freq_factor 4 and original_max_position_embeddings 8192 and a factor."
        )
    factor = config.positive("the factor of the rope scaling", rope["factor"])
    return arguments | {"rope_scaling": True, "rope_scaling_factor": factor}
