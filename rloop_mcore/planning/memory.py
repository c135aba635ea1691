"""The memory of each pipeline stage's GPUs while the policy trains, syncs its weights and lets the engines generate."""

from __future__ import annotations

from dataclasses import dataclass

from rloop_mcore.config import Config
from rloop_mcore.planning.activations import (
    Modules,
    chunk_bytes,
    layer_working_bytes,
    loss_working_bytes,
    micro_batch_tokens,
)
from rloop_mcore.planning.architecture import Architecture
from rloop_mcore.planning.engines import ASLEEP, GIB, EnginePlan
from rloop_mcore.planning.parameters import chunks_of
from rloop_mcore.planning.schedule import micro_batches, most_held
from rloop_mcore.planning.state import Coordinates, state_of
from rloop_mcore.planning.workload import longest_row, rows_of_update
from rloop_mcore.platform.precision import element_bytes

_RUNTIME = int(1.5 * GIB)  # CUDA context, NCCL's buffers, cuBLAS's workspaces (assumed)
_HASHED = 2**26  # bytes of weights at once, for SGLang's checksums
_FRAGMENTS = 0.03  # of what comes and goes: what torch's allocator can't use (assumed)

PARTS = (
    *("weights", "gradients", "optimizer", "activations", "logits", "weight_sync"),
    *("engine_weights", "kv_cache", "engine_other", "runtime"),
)


@dataclass(frozen=True)
class StageMemory:
    """Of a GPU of a pipeline stage: bytes by phase (train, sync, rollout) and part; `host`: in the CPU's memory."""

    stage: int
    phases: dict[str, dict[str, int]]
    host: int

    @property
    def peak(self) -> str:
        """The phase that takes the most."""
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def parts(self) -> dict[str, int]:
        """Of that phase."""
        return self.phases[self.peak]

    @property
    def largest(self) -> str:
        """The part of them that takes the most."""
        return max(self.parts, key=lambda part: self.parts[part])

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())


def stage_memory(model: Architecture, config: Config, stage: int, engine: EnginePlan) -> StageMemory:
    """Of the GPUs of pipeline stage `stage`: the first replica's, which has the least padding."""
    state = state_of(model, config, Coordinates(stage))
    lasting = {"weights": state.weights, "gradients": state.gradients, "optimizer": state.optimizer}
    kept, working, logits = _passing(model, config, stage)
    sync = _sync_bytes(model, config) if stage == 0 else 0
    layout = config.layout
    first = stage * layout.tp * layout.cp * layout.dp
    awake = resting = dict[str, int]()
    if engine.shared and first < config.rollout.engines * config.rollout.tp:
        awake = {"engine_weights": engine.weights, "kv_cache": engine.cache, "engine_other": engine.beside}
        resting = {"engine_other": ASLEEP} if engine.sleeps else awake
    phases = {
        "train": lasting | {"activations": kept + max(0, working - logits), "logits": logits} | resting,
        "sync": lasting | {"weight_sync": sync} | awake,
        "rollout": lasting | awake,
    }
    for parts in phases.values():
        passing = sum(parts.get(part, 0) for part in ("activations", "logits", "weight_sync"))
        parts["runtime"] = _RUNTIME + int(_FRAGMENTS * passing) if config.cluster.device != "cpu" else 0
    whole = {phase: {part: parts.get(part, 0) for part in PARTS} for phase, parts in phases.items()}
    return StageMemory(stage, whole, state.host)


def _passing(model: Architecture, config: Config, stage: int) -> tuple[int, int, int]:
    """Bytes at the height of an update: kept for backward passes, working memory of a layer, and of the loss.

    The last two are not needed at once. A stage's outputs wait for their gradients too.
    """
    layout, recompute, modules = config.layout, config.actor.recompute, Modules.of(config)
    tokens = micro_batch_tokens(config)
    longest = longest_row(config)
    count = micro_batches(rows_of_update(config) * longest, longest, config.actor.micro_batch_tokens, layout)
    output = 0 if layout.pp == 1 else tokens // (layout.tp if layout.sp else 1) * model.hidden * modules.element
    chunks = chunks_of(layout, model.layers, stage)
    held = [
        chunk_bytes(model, layout, chunk, tokens, recompute, modules) + (0 if chunk.last else output)
        for chunk in chunks
    ]
    kept = most_held(held, stage, count, layout.pp) + _replayed_bytes(model, config, sum(c.layers for c in chunks))
    working = layer_working_bytes(model, layout, tokens, recompute, modules) if any(c.layers for c in chunks) else 0
    logits = loss_working_bytes(model, layout, tokens, modules) if chunks[-1].last else 0
    return kept, working, logits


def _replayed_bytes(model: Architecture, config: Config, layers: int) -> int:
    """The experts that routing replay keeps of each position of an update, all replicas' (`actor/routing.py`)."""
    if config.actor.routing_replay == "none":
        return 0
    return rows_of_update(config) * longest_row(config) * layers * model.top_k * (1 if model.experts <= 256 else 4)


def _sync_bytes(model: Architecture, config: Config) -> int:
    """On rank 0 during a sync: two buckets, each of one tensor at least; a policy that is saved takes less.

    A matrix that is sent in FP8 is whole before, and three times in float32 on its way (`rollout/fp8.py`). SGLang's
    checksums take seven times what they hash at once (`rollout/hashers.py`).
    """
    element = element_bytes(config.precision)
    matrix = model.hidden * max(model.queries, model.expert_ffn if model.experts else model.ffn)
    largest = max(model.hidden * model.vocabulary, matrix) * element
    buckets = 2 * max(config.rollout.bucket_mib * 2**20, largest)
    quantizing = matrix * (element + 3 * 4) if config.rollout.quantization == "fp8" else 0
    hashing = 7 * min(_HASHED, largest) if config.rollout.engine == "sglang" else 0
    return buckets + quantizing + hashing
