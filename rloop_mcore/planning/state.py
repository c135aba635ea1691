"""Weights, gradients and optimizer state of one rank, to the byte: Megatron's buffers and how it shards them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from rloop_mcore.config import Config
from rloop_mcore.planning.architecture import Architecture
from rloop_mcore.planning.parameters import Chunk, Tensor, chunk_tensors, chunks_of
from rloop_mcore.platform.precision import RECIPES, element_bytes

_ALIGNED = 64  # elements: a parameter begins at a multiple of them in Megatron's buffer
_BUCKET_END = 128  # elements: a bucket ends at a multiple of them and of the number of shards
_GRADIENT = 4  # bytes of an element: gradients are kept and reduced in fp32


@dataclass(frozen=True)
class Coordinates:
    """A rank's place that its state depends on: pipeline stage, and its shard among the replicas.

    `shard` numbers the dp * cp ranks that hold the same dense parameters, `expert_shard` those that hold the same
    experts.
    """

    stage: int
    shard: int = 0
    expert_shard: int = 0


@dataclass(frozen=True)
class State:
    """parameters: a count; the others bytes on the device, `host`: optimizer state in CPU memory."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    host: int


def state_of(model: Architecture, config: Config, at: Coordinates) -> State:
    """What the rank at `at` holds from the phase's beginning to its end."""
    layout, element = config.layout, element_bytes(config.precision)
    split = layout.tp, layout.etp, layout.ep, layout.pp
    held = weights = elements = owned = 0
    for chunk in chunks_of(layout, model.layers, at.stage):
        if config.actor.distributed_optimizer:
            shards = layout.cp * layout.dp
            parameters, size, mine = _sharded(model, *split, shards, chunk, at.shard, at.expert_shard)
        else:
            parameters = size = mine = sum(tensor.numel for tensor in chunk_tensors(model, *split, chunk))
        held, elements, owned = held + parameters, elements + size, owned + mine
        weights += size * element + _fp8_copies(model, config, chunk)
    bytes_each = _optimizer_bytes(config, element)
    offloaded = int(owned * config.actor.optimizer_offload)
    optimizer, host = (owned - offloaded) * bytes_each, offloaded * (bytes_each + _GRADIENT)
    return State(held, weights, elements * _GRADIENT, optimizer, host)


@lru_cache(maxsize=4096)
def _sharded(
    model: Architecture, tp: int, etp: int, ep: int, pp: int, shards: int, chunk: Chunk, shard: int, expert_shard: int
) -> tuple[int, int, int]:
    """Of a chunk: elements of the parameters, of Megatron's buffers, of what this rank's optimizer owns.

    Experts have a buffer of their own where they are spread otherwise than the rest: over ep > 1 ranks, or etp other
    than tp.
    """
    tensors = chunk_tensors(model, tp, etp, ep, pp, chunk)
    held = sum(tensor.numel for tensor in tensors)
    if not model.experts or (ep == 1 and etp == tp):
        return held, *_padded(tensors, shards, shard)
    size, owned = _padded([tensor for tensor in tensors if not tensor.expert], shards, shard)
    of_experts = _padded([tensor for tensor in tensors if tensor.expert], tp * shards // (etp * ep), expert_shard)
    return held, size + of_experts[0], owned + of_experts[1]


def _padded(tensors: Sequence[Tensor], shards: int, shard: int) -> tuple[int, int]:
    """Elements of a buffer with its padding, and the elements of parameters in this shard.

    Megatron's DistributedOptimizer: parameters from the last to the first, each at a multiple of 64 elements, in one
    bucket (but a shared embedding in its own) that is padded for an equal part a shard; a shard's padding has no state.
    """
    end = start = owned = 0
    places: list[tuple[int, int]] = []

    def close() -> None:
        nonlocal end, start, owned, places
        divisor = math.lcm(shards, _BUCKET_END)
        end = -(-end // divisor) * divisor
        size = (end - start) // shards
        low, high = start + shard * size, start + (shard + 1) * size
        owned += sum(max(0, min(high, last) - max(low, first)) for first, last in places)
        start, places = end, []

    for tensor in reversed(tensors):
        end = -(-end // _ALIGNED) * _ALIGNED
        if tensor.shared and places:
            close()
        if places and places[-1][1] == end:
            places[-1] = places[-1][0], end + tensor.numel
        else:
            places.append((end, end + tensor.numel))
        end += tensor.numel
        if tensor.shared:
            close()
    if places:
        close()
    return end, owned


def _optimizer_bytes(config: Config, element: int) -> int:
    """Of an element that a rank owns: Adam's two moments, and the fp32 main weight where parameters are bf16."""
    main = 4 if element == 2 else 0
    return main + (2 * 2 if config.actor.precision_aware_optimizer else 2 * 4)


def _fp8_copies(model: Architecture, config: Config, chunk: Chunk) -> int:
    """Bytes that Transformer Engine keeps of FP8 matrices beside bf16's: two copies, one for each GEMM that reads it.

    With `fp8.parameter_gather` the two copies stand in the place of the bf16 matrix.
    """
    if config.precision not in RECIPES or config.fp8.simulate or config.fp8.parameter_gather:
        return 0
    layout = config.layout
    layer = chunk_tensors(model, layout.tp, layout.etp, layout.ep, layout.pp, Chunk(1, False, False))
    quantised = 1.0 - (config.fp8.first_bf16_layers + config.fp8.last_bf16_layers) / model.layers
    return int(2 * quantised * chunk.layers * sum(tensor.numel for tensor in layer if tensor.matrix))
