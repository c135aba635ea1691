"""A 2-layer Qwen2 that any layout can take its shards of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from toy_data import FFN, GROUPS, HEAD, HEADS, HIDDEN, LAYERS, SHAPES, VOCABULARY, full_weights


def global_names(chunk: Any) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by global name: layers counted over all stages, the tied output as the embedding."""
    named = {}
    for name, parameter in chunk.named_parameters():
        if name.startswith("decoder.layers."):
            local, rest = name.removeprefix("decoder.layers.").split(".", 1)
            name = f"decoder.layers.{chunk.decoder.layers[int(local)].layer_number - 1}.{rest}"
        named["embedding.word_embeddings.weight" if name == "output_layer.weight" else name] = parameter
    return named


def _shard_dim(name: str) -> int | None:
    if "norm" in name:
        return None
    return 1 if "linear_proj" in name or "linear_fc2" in name else 0


def _split(name: str, full: torch.Tensor, size: int) -> list[torch.Tensor]:
    dim = _shard_dim(name)
    if dim is None:
        return [full] * size
    if "word_embeddings" in name:
        full = torch.nn.functional.pad(full, (0, 0, 0, -len(full) % size))
    if "linear_fc1" in name:  # gate above up, each split on its own
        gate, up = full.chunk(2)
        return [torch.cat(pair) for pair in zip(gate.chunk(size), up.chunk(size), strict=True)]
    return list(full.chunk(size, dim))


def _join(name: str, shards: Sequence[torch.Tensor]) -> torch.Tensor:
    dim = _shard_dim(name)
    if dim is None:
        return shards[0]
    if "linear_fc1" in name:
        return torch.cat([half for i in (0, 1) for half in [shard.chunk(2)[i] for shard in shards]])
    return torch.cat(list(shards), dim)[: SHAPES[name][0]]


def gather_full(tensors: dict[str, torch.Tensor], sum_over_dp: bool = False) -> dict[str, torch.Tensor]:
    """Collective: whole tensors by global name from every rank's shards."""
    gathered: list[Any] = [None] * dist.get_world_size()
    rank = (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_data_parallel_rank())
    dist.all_gather_object(gathered, (rank, {name: tensor.detach().clone() for name, tensor in tensors.items()}))
    whole = {}
    for name in SHAPES:
        shards: dict[int, dict[int, torch.Tensor]] = {}
        for (tp, dp), part in gathered:
            if name in part:
                shards.setdefault(tp, {})[dp] = part[name]
        merged = [sum(by_dp.values()) if sum_over_dp else by_dp[0] for _, by_dp in sorted(shards.items())]
        whole[name] = _join(name, merged)
    return whole


class ToyBridge:
    """A weight bridge whose "folder" is a seed: `Path("3")` holds `full_weights(3)`."""

    def architecture(self) -> dict[str, Any]:
        return {
            "transformer": {
                "num_layers": LAYERS,
                "hidden_size": HIDDEN,
                "num_attention_heads": HEADS,
                "num_query_groups": GROUPS,
                "kv_channels": HEAD,
                "ffn_hidden_size": FFN,
                "normalization": "RMSNorm",
                "layernorm_epsilon": 1e-6,
                "add_bias_linear": False,
                "add_qkv_bias": True,
                "gated_linear_unit": True,
                "activation_func": torch.nn.functional.silu,
                "hidden_dropout": 0.0,
                "attention_dropout": 0.0,
            },
            "gpt": {
                "vocab_size": VOCABULARY,
                "max_sequence_length": 64,
                "position_embedding_type": "rope",
                "rotary_base": 10000,
                "share_embeddings_and_output_weights": True,
            },
        }

    def load(self, chunks: Sequence[torch.nn.Module], path: Path) -> None:
        weights = full_weights(int(path.name))
        rank = parallel_state.get_tensor_model_parallel_rank()
        size = parallel_state.get_tensor_model_parallel_world_size()
        for chunk in chunks:
            for name, parameter in global_names(chunk).items():
                parameter.data.copy_(_split(name, weights[name], size)[rank])

    def export(self, chunks: Sequence[torch.nn.Module]) -> Any:
        named = {name: p for chunk in chunks for name, p in global_names(chunk).items()}
        whole = gather_full(named)
        if dist.get_rank() == 0:
            yield from whole.items()

    def save(self, tensors: Any, path: Path) -> Any:
        raise NotImplementedError
