"""How long a step takes, from the multiplications and bytes in it and a cluster's rates.

An estimate for choosing between layouts: the efficiencies are measured on one H200 (docs/gpu.md) for training in bf16
and FP8, and assumed for everything else (docs/planning.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rloop_mcore.config import Config
from rloop_mcore.planning.architecture import Architecture
from rloop_mcore.planning.engines import EnginePlan, cache_bytes, weight_bytes
from rloop_mcore.planning.layouts import processes
from rloop_mcore.planning.parameters import chunks_of, total_parameters
from rloop_mcore.planning.schedule import bubble, micro_batches
from rloop_mcore.planning.state import Coordinates, state_of
from rloop_mcore.planning.workload import TokenWork, longest_row, mean_lengths, rows_of_update
from rloop_mcore.platform.precision import element_bytes

# docs/gpu.md: share of the dense bf16 peak in training, by the model's width; and FP8 over bf16 at the widest.
_MFU = ((896, 0.322), (1536, 0.472), (3584, 0.525))
_FP8_SPEED = {"fp8_delayed": 1.33, "fp8_tensorwise": 1.31, "fp8_blockwise": 1.21, "mxfp8": 1.21}  # mxfp8: assumed
# Assumed, not measured here:
_LINK, _READING, _DECODING = 0.75, 0.7, 0.5  # shares of peak: of a link, of memory in decoding, of arithmetic in it
_DECODE_STEP_S, _REDUCE_S = 2e-3, 20e-6  # of a decoding step: all that isn't reading; an all-reduce of few tokens
_ADAM_BYTES = 30  # read and written of an element: gradient, main weight, two moments, bf16 weight
_HOST_GB_S = 25.0  # between a GPU and the CPU's memory, with Adam there


@dataclass(frozen=True)
class StepTimes:
    """Seconds of an RL step and its parts; tokens a second of the whole cluster, in training and in generation."""

    micro_batches: int  # of a replica, in an update
    bubble: float  # share of an update
    update_s: float
    train_s: float
    rollout_s: float
    sync_s: float
    step_s: float
    train_tokens_per_s: float
    rollout_tokens_per_s: float
    mfu: float  # share of the bf16 peak that an update's multiplications come to, without those done again


def step_times(model: Architecture, config: Config, engine: EnginePlan) -> StepTimes | None:
    """The estimate; None where `cluster.gpu` has no rates."""
    gpu, algorithm = config.cluster.gpu, config.algorithm
    if not (gpu.bf16_tflops and gpu.memory_gb_s):
        return None
    prompt, response = mean_lengths(config)
    rows = rows_of_update(config)
    tokens = rows * (prompt + response)
    count = micro_batches(int(tokens), longest_row(config), config.actor.micro_batch_tokens, config.layout)
    forward, backward = _passes(model, config, tokens)
    waiting = bubble(count, config.layout)
    update = (forward + backward) / (1 - waiting) + _once_an_update(model, config)
    train = algorithm.updates_per_step * update
    passes = (algorithm.old_logprobs == "trainer") + (algorithm.kl_coefficient > 0)
    train += algorithm.updates_per_step * passes * forward / (1 - waiting)
    running = _running(config, engine)
    speed = running / _decoding_s(model, config, running)
    rollout = _rollout_s(model, config, speed)
    sync = _sync_s(model, config, engine)
    work = TokenWork.of(model, prompt + response)
    of_token = 3 * (model.layers * (work.layer + work.attention) + work.output * response / (prompt + response))
    together = max(train, rollout) if config.rollout.max_lag else train + rollout
    return StepTimes(
        micro_batches=count,
        bubble=waiting,
        update_s=update,
        train_s=train,
        rollout_s=rollout,
        sync_s=sync,
        step_s=together + sync,
        train_tokens_per_s=tokens / update,
        rollout_tokens_per_s=speed * config.rollout.engines,
        mfu=tokens / update * of_token / (processes(config.layout) * gpu.bf16_tflops * 1e12),
    )


def efficiency(width: float) -> float:
    """The share of peak at a model's width: between the measured widths by the logarithm, constant beyond them."""
    (low, value), *rest = _MFU
    if width <= low:
        return value
    for high, above in rest:
        if width <= high:
            return value + (above - value) * math.log(width / low) / math.log(high / low)
        low, value = high, above
    return value


def _passes(model: Architecture, config: Config, tokens: float) -> tuple[float, float]:
    """Seconds of the slowest stage for an update's forward and backward passes over `tokens`, without waiting."""
    layout, gpu = config.layout, config.cluster.gpu
    prompt, response = mean_lengths(config)
    work = TokenWork.of(model, prompt + response)
    width = math.sqrt(model.hidden * model.expert_ffn) if model.experts else float(model.hidden)
    rate = gpu.bf16_tflops * 1e12 * efficiency(width / math.sqrt(layout.tp)) * _FP8_SPEED.get(config.precision, 1.0)
    if config.precision == "fp32":
        rate /= 2  # TF32's peak
    device_tokens = tokens / (layout.dp * layout.cp)
    slowest = 0.0, 0.0
    for stage in range(layout.pp):
        chunks = chunks_of(layout, model.layers, stage)
        layers = sum(chunk.layers for chunk in chunks)
        output = work.output * response / (prompt + response) * chunks[-1].last
        forward = layers * (work.layer + work.attention) + output
        again = {"none": 0.0, "selective": layers * work.attention, "full": layers * (work.layer + work.attention)}
        once, repeated = _exchanges(model, config, layers)
        forward_s = device_tokens * (forward / layout.tp / rate + once)
        backward_s = device_tokens * ((2 * forward + again[config.actor.recompute]) / layout.tp / rate + repeated)
        slowest = max(slowest, (forward_s, backward_s), key=sum)
    return slowest


def _exchanges(model: Architecture, config: Config, layers: int) -> tuple[float, float]:
    """Seconds a device's token costs in a stage's communication, forward and backward; nothing of it overlapped."""
    layout, element = config.layout, element_bytes(config.precision)
    hidden = model.hidden * element
    recomputed = config.actor.recompute == "full"
    tensor = (layout.tp - 1) / layout.tp * hidden * _per_byte(config, layout.tp)  # one gather, or one scatter
    ring = (layout.cp - 1) * 2 * model.keys / layout.tp * element * _per_byte(config, layout.tp * layout.cp)
    expert_ranks = layout.ep * layout.etp
    share = 1 / layout.tp if layout.sp else 1.0
    routed = share * model.top_k * hidden * (expert_ranks - 1) / expert_ranks * _per_byte(config, expert_ranks)
    forward = layers * ((4 if not model.experts else 2) * tensor + ring + 2 * routed)
    backward = layers * ((4 + 2 * layout.sp if not model.experts else 3) * tensor + 2 * ring + 2 * routed)
    backward += forward * recomputed
    stages = layout.vpp * share * hidden * _per_byte(config, math.inf) if layout.pp > 1 else 0.0
    return forward + stages, backward + stages


def _per_byte(config: Config, ranks: float) -> float:
    """Seconds a byte takes between `ranks` ranks that follow each other: in a node, or over the network."""
    cluster = config.cluster
    inside = cluster.nodes == 1 or ranks <= (cluster.gpus_per_node or math.inf)
    rate = cluster.gpu.node_gb_s if inside else cluster.gpu.network_gb_s
    return 1 / (rate * 1e9 * _LINK) if rate else 0.0


def _once_an_update(model: Architecture, config: Config) -> float:
    """Seconds to sum the gradients, step and gather the weights, on the stage that has most to do."""
    layout, gpu = config.layout, config.cluster.gpu
    state = max((state_of(model, config, Coordinates(stage)) for stage in range(layout.pp)), key=lambda s: s.gradients)
    replicas = layout.dp * layout.cp
    between = (replicas - 1) / replicas * (state.gradients + state.weights)
    owned = state.parameters / (replicas if config.actor.distributed_optimizer else 1)
    offloaded = owned * config.actor.optimizer_offload
    step = (owned - offloaded) * _ADAM_BYTES / (gpu.memory_gb_s * 1e9) + offloaded * _ADAM_BYTES / (_HOST_GB_S * 1e9)
    return between * _per_byte(config, layout.tp * replicas) + step


def _decoding_s(model: Architecture, config: Config, running: float) -> float:
    """Seconds of an engine's decoding step over `running` sequences."""
    gpu, rollout = config.cluster.gpu, config.rollout
    parameters, element = total_parameters(model), element_bytes(config.precision)
    read = min(1.0, parameters["active"] * max(1.0, running) / parameters["total"])
    read *= weight_bytes(model, config, rollout.tp, rollout.dp)
    prompt, response = mean_lengths(config)
    read += running / rollout.dp * (prompt + response / 2) * cache_bytes(model, rollout.tp // rollout.dp, element)
    reading = read / (gpu.memory_gb_s * 1e9 * _READING)
    computing = 2.0 * parameters["active"] * running / rollout.tp / (gpu.bf16_tflops * 1e12 * _DECODING)
    return reading + computing + _DECODE_STEP_S + (2 * model.layers * _REDUCE_S if rollout.tp > 1 else 0.0)


def _running(config: Config, engine: EnginePlan) -> float:
    """Sequences that an engine decodes at once."""
    asked = config.algorithm.sampled_per_step * config.algorithm.group_size / config.rollout.engines
    fitting = engine.tokens / sum(mean_lengths(config)) if engine.tokens else math.inf
    return max(1.0, min(config.rollout.max_running, asked, fitting))


def _rollout_s(model: Architecture, config: Config, speed: float) -> float:
    """Seconds of one sampling round: all tokens at full speed, but no less than the longest response takes alone."""
    algorithm, (prompt, response) = config.algorithm, mean_lengths(config)
    samples = algorithm.sampled_per_step * algorithm.group_size
    rate = config.cluster.gpu.bf16_tflops * 1e12 * _DECODING * config.rollout.tp * config.rollout.engines
    prefill = 2.0 * total_parameters(model)["active"] * algorithm.sampled_per_step * prompt / rate
    decoding = samples * response / (speed * config.rollout.engines)
    return prefill + max(decoding, config.rollout.max_tokens * _decoding_s(model, config, 1.0))


def _sync_s(model: Architecture, config: Config, engine: EnginePlan) -> float:
    """Seconds to send all weights, once."""
    return weight_bytes(model, config) * _per_byte(config, 1 if engine.shared else math.inf)
