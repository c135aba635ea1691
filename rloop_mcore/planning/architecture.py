"""A model's sizes: those that a configuration states, against those of its config.json; and as the planner has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rloop_mcore.config import ArchitectureConfig
from rloop_mcore.errors import UserError

# Not sizes: base and instruct models of one size, or their later releases, differ in them, and config.json counts.
_OF_A_RELEASE = ("max_position_embeddings", "rope_theta", "rms_norm_eps")
SIZES = tuple(size.name for size in fields(ArchitectureConfig) if size.name not in _OF_A_RELEASE)
_NEEDED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
_OPTIONAL = (
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size"),
)
_QKV_BIAS = ("qwen2",)  # families whose Q, K and V projections have biases
_QK_NORM = ("qwen3", "qwen3_moe")  # families that norm every query and key head


@dataclass(frozen=True)
class Architecture:
    """The sizes of a decoder: all that its parameters, activations and arithmetic follow from."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    positions: int  # 0: not said
    tied: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: int = 0  # 0: a dense model
    top_k: int = 0
    expert_ffn: int = 0

    @classmethod
    def of(cls, values: Mapping[str, Any], source: Path | str) -> Architecture:
        """From the keys of the config.json `source`. Raises UserError for a size that is missing or no whole number."""
        for key in _NEEDED:
            if not (type(size := values.get(key)) is int and size > 0):
                raise UserError(f"{source} has no {key} above 0: the sizes of a model need it.")
        for key in _OPTIONAL:
            if type(values.get(key, 0)) not in (int, type(None)):
                raise UserError(f"{source}: {key} is {values[key]!r}; it has to be a whole number.")
        heads = values["num_attention_heads"]
        experts = values.get("num_experts") or values.get("num_local_experts") or 0
        family = values.get("model_type")
        return cls(
            layers=values["num_hidden_layers"],
            hidden=values["hidden_size"],
            heads=heads,
            kv_heads=values.get("num_key_value_heads") or heads,
            head_dim=values.get("head_dim") or values["hidden_size"] // heads,
            ffn=values["intermediate_size"],
            vocabulary=values["vocab_size"],
            positions=values.get("max_position_embeddings") or 0,
            tied=bool(values.get("tie_word_embeddings")),
            qkv_bias=family in _QKV_BIAS,
            qk_norm=family in _QK_NORM,
            experts=experts,
            top_k=(values.get("num_experts_per_tok") or 1) if experts else 0,
            expert_ffn=(values.get("moe_intermediate_size") or values["intermediate_size"]) if experts else 0,
        )

    @property
    def queries(self) -> int:
        """The width of all query heads."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """The width of all key heads, and of all value heads."""
        return self.kv_heads * self.head_dim


def check_architecture(stated: ArchitectureConfig, found: Mapping[str, Any], file: Path) -> None:
    """Raises UserError where the config.json `found` in `file` has another size than `stated`.

    A size that one of them leaves out is not compared; of head_dim, which many leave out, the usual value counts.
    """
    values = dict(found)
    if values.get("num_experts") is None:  # transformers 5 writes num_local_experts
        values["num_experts"] = values.get("num_local_experts")
    hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if values.get("head_dim") is None and type(hidden) is type(heads) is int and heads:
        values["head_dim"] = hidden // heads
    for name in SIZES:
        wanted, value = getattr(stated, name), values.get(name)
        if wanted is not None and value is not None and wanted != value:
            raise UserError(
                f"model.architecture.{name}={_text(wanted)} and {file} says {_text(value)}: it is not of the model "
                "that model= or the experiment chose."
            )


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
