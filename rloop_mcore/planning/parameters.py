"""The parameters of a pipeline chunk, tensor by tensor and in Megatron's order, as one rank holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from rloop_mcore.config import LayoutConfig
from rloop_mcore.planning.architecture import Architecture
from rloop_mcore.planning.layouts import stages


@dataclass(frozen=True)
class Tensor:
    """A parameter, or its shard: `numel` elements."""

    name: str
    numel: int
    expert: bool = False
    shared: bool = False  # tied embeddings on two pipeline stages: Megatron gives the tensor a bucket of its own
    matrix: bool = False  # of a layer's linear: what FP8 recipes quantise


@dataclass(frozen=True)
class Chunk:
    """A pipeline chunk: so many layers, perhaps with the embedding before and the output layer behind them."""

    layers: int
    first: bool
    last: bool


def chunks_of(layout: LayoutConfig, layers: int, stage: int) -> list[Chunk]:
    """The vpp chunks of pipeline stage `stage`: chunk v is the model's chunk v * pp + stage."""
    split = stages(layout, layers)
    places = range(stage, layout.pp * layout.vpp, layout.pp)
    return [Chunk(split[place], place == 0, place == len(split) - 1) for place in places]


def vocabulary_rows(model: Architecture, tp: int) -> int:
    """The rows of the embedding on each of the tp ranks, padding included."""
    return -(-model.vocabulary // tp)


@lru_cache(maxsize=4096)
def chunk_tensors(model: Architecture, tp: int, etp: int, ep: int, pp: int, chunk: Chunk) -> tuple[Tensor, ...]:
    """One rank's parameters of `chunk`, as `named_parameters` of Megatron's local layers lists them."""
    rows = vocabulary_rows(model, tp) * model.hidden
    found = [Tensor("embedding", rows, shared=model.tied and pp > 1)] if chunk.first else []
    layer = [
        Tensor("input_layernorm", model.hidden),
        *_attention(model, tp),
        Tensor("pre_mlp_layernorm", model.hidden),
        *(_experts(model, etp, ep) if model.experts else _mlp(model.hidden, model.ffn // tp)),
    ]
    found += layer * chunk.layers
    if chunk.last:
        found.append(Tensor("final_layernorm", model.hidden))
        if not (model.tied and chunk.first):
            found.append(Tensor("output_layer", rows, shared=model.tied and pp > 1))
    return tuple(found)


def _attention(model: Architecture, tp: int) -> list[Tensor]:
    fused = (model.queries + 2 * model.keys) // tp
    found = [
        Tensor("linear_proj", model.queries // tp * model.hidden, matrix=True),
        Tensor("linear_qkv", fused * model.hidden, matrix=True),
    ]
    if model.qkv_bias:
        found.append(Tensor("linear_qkv.bias", fused))
    return found + ([Tensor("q_layernorm", model.head_dim), Tensor("k_layernorm", model.head_dim)] * model.qk_norm)


def _mlp(hidden: int, ffn: int, expert: bool = False) -> list[Tensor]:
    return [
        Tensor("linear_fc1", 2 * ffn * hidden, expert=expert, matrix=True),
        Tensor("linear_fc2", ffn * hidden, expert=expert, matrix=True),
    ]


def _experts(model: Architecture, etp: int, ep: int) -> list[Tensor]:
    of_one = _mlp(model.hidden, model.expert_ffn // etp, expert=True)
    return [Tensor("router", model.experts * model.hidden), *of_one * (model.experts // ep)]


@lru_cache(maxsize=64)
def total_parameters(model: Architecture) -> Mapping[str, int]:
    """Of the whole model, without padding: {"total", "active" (a token's), and by tensor}."""
    tensors = chunk_tensors(model, 1, 1, 1, 1, Chunk(model.layers, True, True))
    by_tensor: dict[str, int] = {}
    for tensor in tensors:
        by_tensor[tensor.name] = by_tensor.get(tensor.name, 0) + tensor.numel
    total = sum(by_tensor.values())
    idle = sum(tensor.numel for tensor in tensors if tensor.expert)
    idle -= idle * model.top_k // model.experts if model.experts else 0
    return {"total": total, "active": total - idle} | by_tensor
