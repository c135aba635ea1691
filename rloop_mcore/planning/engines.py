"""What an engine takes of a GPU: its share of the weights, and a cache of keys and values for the rest."""

from __future__ import annotations

from dataclasses import dataclass

from rloop_mcore.config import Config
from rloop_mcore.planning.architecture import Architecture
from rloop_mcore.planning.parameters import total_parameters

GIB = 2**30
OWN_CHOICE = 0.85  # SGLang's --mem-fraction-static on GPUs of 80 GB and more, about
_BESIDE = 4 * GIB  # activations, CUDA graphs, context: outside of the fraction (assumed)
_ASLEEP = GIB  # what a sleeping engine keeps (assumed)


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

    @property
    def awake(self) -> int:
        """While it generates."""
        return self.weights + self.cache + self.beside

    @property
    def resting(self) -> int:
        """While the policy trains."""
        return _ASLEEP if self.sleeps else self.awake


def cache_bytes(model: Architecture, tp: int, element: int) -> int:
    """Keys and values of one token on one of an engine's tp GPUs; a key/value head is copied where tp is above them."""
    return 2 * model.layers * max(1, model.kv_heads // tp) * model.head_dim * element


def engine_plan(model: Architecture, config: Config, memory: float) -> EnginePlan:
    """Of a GPU of `memory` bytes. The cache takes what the weights leave of `rollout.memory_fraction`: perhaps nothing.

    The embedded engine grows its cache with what it generates: at most max_running whole sequences.
    """
    rollout = config.rollout
    if rollout.endpoints:
        return EnginePlan(0, 0, 0, 0, shared=False, sleeps=False)
    tp = rollout.tp if rollout.engine == "sglang" else 1
    element = 4 if config.precision == "fp32" else 2
    weights, of_token = total_parameters(model)["total"] * element // tp, cache_bytes(model, tp, element)
    if rollout.engine == "embedded":
        tokens = rollout.max_running * (config.data.max_prompt_tokens + rollout.max_tokens)
        return EnginePlan(weights, tokens * of_token, GIB, tokens, shared=True, sleeps=False)
    fraction = OWN_CHOICE if rollout.memory_fraction is None else rollout.memory_fraction
    cache = max(0, int(fraction * memory) - weights)
    separate = rollout.nodes > 0 or (bool(rollout.gpus) and min(rollout.gpus) >= _trainer_gpus(config))
    return EnginePlan(weights, cache, _BESIDE, cache // of_token, not separate, rollout.sleep and not separate)


def _trainer_gpus(config: Config) -> int:
    """GPUs of this machine that the trainer takes, from the first on."""
    layout = config.layout
    wanted = layout.tp * layout.pp * layout.cp * layout.dp
    return min(wanted, config.cluster.gpus_per_node or wanted)


def legal_engine_tp(model: Architecture, gpus: int) -> list[int]:
    """The tp of SGLang servers that a model allows, up to the `gpus` of a node: divisors of the query heads."""
    sizes = [tp for tp in range(1, gpus + 1) if model.heads % tp == 0]
    return [tp for tp in sizes if model.kv_heads % tp == 0 or tp % model.kv_heads == 0]
