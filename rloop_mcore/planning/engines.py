"""What an engine takes of a GPU: its share of the weights, and a cache of keys and values for the rest."""

from __future__ import annotations

from dataclasses import dataclass

from rloop_mcore.config import Config, RolloutConfig
from rloop_mcore.errors import UserError
from rloop_mcore.planning.architecture import Architecture
from rloop_mcore.planning.layouts import processes
from rloop_mcore.planning.parameters import total_parameters
from rloop_mcore.platform.precision import FP8_BLOCK, element_bytes

GIB = 2**30
OWN_CHOICE = 0.85  # SGLang's --mem-fraction-static on GPUs of 80 GB and more, about
_BESIDE = 4 * GIB  # activations, CUDA graphs, context: outside of the fraction (assumed)
ASLEEP = GIB  # what a sleeping engine keeps (assumed)
_FP8_BYTES = 1 + 4 / FP8_BLOCK**2  # a value, and its share of the scale
_MATRICES = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
_OF_A_GROUP = ("embedding", "linear_qkv", "linear_qkv.bias", "linear_proj")  # data parallel attention copies them


@dataclass(frozen=True)
class EnginePlan:
    """Of one GPU of an engine, in bytes; `tokens`: of sequences whose keys and values fit, over the whole engine.

    shared: the GPU is a trainer's too; sleeps: the memory is given up while the policy trains. `weights` and `cache`
    are 0 for servers that others started.
    """

    weights: int
    cache: int
    beside: int
    tokens: int
    shared: bool
    sleeps: bool


def weight_bytes(model: Architecture, config: Config, tp: int = 1, dp: int = 1) -> int:
    """On one of an engine's tp GPUs, of which dp groups have an attention each.

    A key/value head is copied where a group's GPUs are above them, as in `cache_bytes`.
    """
    element = element_bytes(config.precision)
    of_matrix = _FP8_BYTES if config.rollout.quantization == "fp8" else element
    kv_copies = max(1, tp // dp // model.kv_heads)
    copied = dict.fromkeys(_OF_A_GROUP, 1.0)
    for name in ("linear_qkv", "linear_qkv.bias"):
        copied[name] = (model.heads + 2 * model.kv_heads * kv_copies) / (model.heads + 2 * model.kv_heads)
    return int(
        sum(
            count * (of_matrix if name in _MATRICES else element) * (dp * copied[name] if name in copied else 1) / tp
            for name, count in total_parameters(model).items()
            if name not in ("total", "active")
        )
    )


def cache_bytes(model: Architecture, tp: int, element: int) -> int:
    """Keys and values of one token on one of the tp GPUs that share it (an engine's, or those of one of its dp groups);
    a key/value head is copied where tp is above them."""
    return 2 * model.layers * max(1, model.kv_heads // tp) * model.head_dim * element


def engine_plan(model: Architecture, config: Config, memory: float) -> EnginePlan:
    """Of a GPU of `memory` bytes. The cache takes what the weights leave of `rollout.memory_fraction`: perhaps nothing.

    The embedded engine grows its cache with what it generates: at most max_running whole sequences.
    """
    rollout = config.rollout
    if rollout.endpoints:
        return EnginePlan(0, 0, 0, 0, shared=False, sleeps=False)
    tp, dp = (rollout.tp, rollout.dp) if rollout.engine == "sglang" else (1, 1)
    weights = weight_bytes(model, config, tp, dp)
    of_token = cache_bytes(model, tp // dp, element_bytes(config.precision))
    if rollout.engine == "embedded":
        tokens = rollout.max_running * (config.data.max_prompt_tokens + rollout.max_tokens)
        return EnginePlan(weights, tokens * of_token, GIB, tokens, shared=True, sleeps=False)
    fraction = OWN_CHOICE if rollout.memory_fraction is None else rollout.memory_fraction
    cache = max(0, int(fraction * memory) - weights)
    separate = rollout.nodes > 0 or (bool(rollout.gpus) and min(rollout.gpus) >= _taken_here(config))
    return EnginePlan(weights, cache, _BESIDE, dp * (cache // of_token), not separate, rollout.sleep and not separate)


def _taken_here(config: Config) -> int:
    """GPUs of this machine that the trainer takes, from the first on."""
    wanted = processes(config.layout)
    return min(wanted, config.cluster.gpus_per_node or wanted)


def legal_engine_tp(model: Architecture, gpus: int) -> list[int]:
    """The tp of SGLang servers that a model allows, up to the `gpus` of a node: divisors of the query heads."""
    sizes = [tp for tp in range(1, gpus + 1) if model.heads % tp == 0]
    return [tp for tp in sizes if model.kv_heads % tp == 0 or tp % model.kv_heads == 0]


def check_engine(model: Architecture, rollout: RolloutConfig) -> None:
    """Raise UserError where SGLang cannot split the model into `rollout.dp` groups, or into blocks of FP8."""
    if rollout.dp > 1 and not model.experts:
        raise UserError(
            f"rollout.dp={rollout.dp} copies the attention and shares the experts, and this model has none: use "
            "rollout.engines."
        )
    if rollout.quantization != "fp8":
        return
    attention_tp, expert_tp = rollout.tp // rollout.dp, rollout.tp // rollout.ep
    ffn, ffn_tp = (model.expert_ffn, expert_tp) if model.experts else (model.ffn, rollout.tp)
    sides = {
        "hidden_size": (model.hidden, 1),
        "num_attention_heads x head_dim": (model.heads * model.head_dim, attention_tp),
        "num_key_value_heads x head_dim": (model.kv_heads * model.head_dim, min(attention_tp, model.kv_heads)),
        "moe_intermediate_size" if model.experts else "intermediate_size": (ffn, ffn_tp),
    }
    for name, (size, ranks) in sides.items():
        if size % (FP8_BLOCK * ranks):
            raise UserError(
                f"rollout.quantization=fp8 works in blocks of {FP8_BLOCK} x {FP8_BLOCK}, and {name}={size} over "
                f"{ranks} GPUs is no multiple: use fewer, or rollout.quantization=none."
            )
