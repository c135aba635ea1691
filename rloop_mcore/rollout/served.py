"""What a server keeps of the model, from what it says of itself (/server_info)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rloop_mcore.errors import Fault, UserError
from rloop_mcore.rollout.checksums import KeptWeights
from rloop_mcore.rollout.hashers import TileHasher, embedded_hasher, sglang_cpu_hasher

EMBEDDED = "+rloop.embedded"  # how the version of the embedded engine ends
_DTYPES = {
    "float32": torch.float32,
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
}


@dataclass(frozen=True)
class ServedModel:
    """The facts of config.json that the engines' clients need."""

    vocabulary: int  # ids below it are valid
    query_heads: int = 1
    kv_heads: int = 1
    experts: int = 1
    dtype: str = "float32"
    fp8: bool = False  # the engines keep the matrices of the layers in FP8

    @classmethod
    def of(cls, config: dict[str, Any], folder: Path, fp8: bool = False) -> ServedModel:
        """From the config.json of an HF folder. Raises UserError where it is not that of a language model."""
        for name in ("vocab_size", "num_attention_heads"):
            if not isinstance(config.get(name), int):
                raise UserError(f"{folder / 'config.json'} has no {name}: it is not the folder of a language model.")
        heads = int(config["num_attention_heads"])
        return cls(
            vocabulary=int(config["vocab_size"]),
            query_heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            experts=int(config.get("num_experts") or config.get("num_local_experts") or 1),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
            fp8=fp8,
        )


def kept_dtype(info: dict[str, Any], model: ServedModel, where: str) -> torch.dtype:
    """The dtype an engine computes in. Raises Fault where /server_info names none that is known."""
    named = str(info.get("dtype"))
    if named == "auto":  # SGLang's choice: bfloat16 for bfloat16 checkpoints, else float16
        named = "bfloat16" if model.dtype == "bfloat16" else "float16"
    if named not in _DTYPES:
        raise Fault(f"{where}/server_info: dtype {named!r} is none of {', '.join(_DTYPES)}")
    return _DTYPES[named]


def kept_weights(info: dict[str, Any], model: ServedModel, where: str) -> KeptWeights:
    """Which checksums the engine will answer with. Raises Fault for one whose weights can't be brought up to date."""
    if str(info.get("version")).endswith(EMBEDDED):
        return KeptWeights(embedded_hasher, fused=False)
    # Before 0.5.22 `dp_size` counts the groups of data parallel attention; since then `attn_dp_size` does.
    groups, replicas = int(info.get("attn_dp_size") or 1), int(info.get("dp_size") or 1)
    if groups == 1 and info.get("enable_dp_attention"):
        groups, replicas = replicas, 1
    if replicas > 1:
        raise Fault(
            f"{where} has --dp-size {replicas} without --enable-dp-attention: SGLang takes no weights into such "
            "replicas; start a server for each."
        )
    if int(info.get("pp_size") or 1) > 1:
        raise Fault(
            f"{where} has --pp-size {info['pp_size']}: SGLang numbers the ranks of a weight update by tensor "
            "parallel rank alone; start it with --pp-size 1."
        )
    if info.get("quantization") not in ((None, "fp8") if model.fp8 else (None,)):
        raise Fault(
            f"{where} has --quantization {info['quantization']}: its weights are checked against those that were sent; "
            "start it without, or for fp8 set rollout.quantization=fp8."
        )
    return KeptWeights(
        TileHasher if info.get("device") != "cpu" else sglang_cpu_hasher,
        fused=True,
        tp=int(info.get("tp_size") or 1),
        dp=groups,
        ep=int(info.get("ep_size") or 1),
        head_split=bool(info.get("enable_dp_lm_head")),
        query_heads=model.query_heads,
        kv_heads=model.kv_heads,
        experts=model.experts,
    )
