"""The toy policy's random weights, whole, and batches to train it on. No Megatron here."""

from __future__ import annotations

import random
import zlib

import torch

from rloop_mcore.types import Example, Trajectory

VOCABULARY, HIDDEN, HEADS, GROUPS, HEAD, FFN, LAYERS = 47, 32, 4, 2, 8, 48, 2
SHAPES = {
    "embedding.word_embeddings.weight": (VOCABULARY, HIDDEN),
    "decoder.final_layernorm.weight": (HIDDEN,),
} | {
    f"decoder.layers.{layer}.{name}": shape
    for layer in range(LAYERS)
    for name, shape in {
        "input_layernorm.weight": (HIDDEN,),
        "self_attention.linear_qkv.weight": ((HEADS + 2 * GROUPS) * HEAD, HIDDEN),
        "self_attention.linear_qkv.bias": ((HEADS + 2 * GROUPS) * HEAD,),
        "self_attention.linear_proj.weight": (HIDDEN, HEADS * HEAD),
        "pre_mlp_layernorm.weight": (HIDDEN,),
        "mlp.linear_fc1.weight": (2 * FFN, HIDDEN),
        "mlp.linear_fc2.weight": (HIDDEN, FFN),
    }.items()
}


def full_weights(seed: int) -> dict[str, torch.Tensor]:
    """Every parameter, whole, by its global Megatron name."""
    weights = {}
    for name, shape in SHAPES.items():
        generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
        weights[name] = torch.randn(shape, generator=generator) * 0.3 + ("norm" in name)
    return weights


def trajectories(count: int, seed: int) -> list[Trajectory]:
    """Random prompts and responses of different lengths, with plausible behaviour logprobs."""
    generator = random.Random(seed)
    rows = []
    for i in range(count):
        response = tuple(generator.randrange(VOCABULARY) for _ in range(generator.randint(1, 9)))
        rows.append(
            Trajectory(
                iteration=0,
                step=0,
                problem_id=str(i),
                sample=0,
                prompt_ids=tuple(generator.randrange(VOCABULARY) for _ in range(generator.randint(2, 6))),
                response_ids=response,
                logprobs=tuple(-generator.uniform(1.0, 8.0) for _ in response),
                finish_reason="stop",
                weight_version=0,
                correct=i % 2 == 0,
                reward=float(i % 2),
                reason="",
            )
        )
    return rows


def advantages(count: int) -> list[float]:
    """One a trajectory, of both signs."""
    return [(-1.0) ** i * (0.5 + i / 7) for i in range(count)]


def examples(count: int, seed: int) -> list[Example]:
    """The trajectories as supervised examples."""
    return [Example(row.prompt_ids, row.response_ids) for row in trajectories(count, seed)]
