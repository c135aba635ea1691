"""Cross-checks of a configuration, before anything starts. Imports no torch.

Each mistake raises a UserError of one sentence that names the key; what is legal but surely unwanted is a warning.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rloop_mcore import platform
from rloop_mcore.algorithm.hard_problems import samples_needed
from rloop_mcore.config import Config, GpuConfig, ModelConfig, RolloutConfig
from rloop_mcore.errors import UserError
from rloop_mcore.hf_config import read_hf_config
from rloop_mcore.planning.architecture import Architecture, check_architecture
from rloop_mcore.planning.engines import check_engine
from rloop_mcore.planning.layouts import broken_rule, nearest_legal, overrides, processes
from rloop_mcore.planning.nodes import idle_gpus, split_groups
from rloop_mcore.platform.precision import PRECISIONS, check_bf16_layers, check_fp8_sizes, check_precision
from rloop_mcore.run_config import flat
from rloop_mcore.weights.families import FAMILIES

_FAMILIES = tuple(sorted(family.name for family in FAMILIES))
_OPTIMIZERS = ("optimizer", "rft.optimizer", "sft.optimizer")
_CHOICES = {
    "precision": PRECISIONS,
    "model.family": ("auto", *_FAMILIES),
    "model.architecture.model_type": (None, *_FAMILIES),
    "algorithm.advantage": ("group_std", "group_mean", "leave_one_out"),
    "algorithm.aggregation": ("token_mean", "sequence_mean", "dr_grpo"),
    "algorithm.kl_estimator": ("k1", "k2", "k3"),
    "algorithm.old_logprobs": ("engine", "trainer"),
    "algorithm.importance": ("none", "truncate", "mask"),
    "rft.loss": ("token_mean", "reward_weighted"),
    "sft.loss": ("token_mean", "reward_weighted"),
    "actor.routing_replay": ("none", "first_forward"),
    **{f"{section}.schedule": ("constant", "cosine") for section in _OPTIMIZERS},
    "actor.recompute": ("none", "selective", "full"),
    "guard.policy": ("stop", "end_phase", "skip"),
    "rollout.engine": ("embedded", "sglang"),
    "rollout.quantization": ("none", "fp8"),
    "reward.answer_format": ("boxed", "answer_line"),
    "cluster.device": ("auto", "cpu", "cuda"),
    "cluster.slurm.container": ("none", "pyxis", "apptainer"),
}
_POSITIVE = (
    *(f"layout.{name}" for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")),
    *(f"algorithm.{name}" for name in ("prompts_per_step", "sampled_per_step", "sampling_rounds")),
    *(f"{section}.{name}" for section in ("rft", "sft") for name in ("epochs", "batch_size")),
    *(f"{section}.{name}" for section in _OPTIMIZERS for name in ("lr", "eps")),
    "actor.micro_batch_tokens",
    *(f"rollout.{name}" for name in ("max_tokens", "temperature", "max_running", "bucket_mib")),
    *(f"rollout.{name}" for name in ("engines", "tp", "dp", "ep")),
    "rollout.mismatch_mean_gate",
    *(f"rollout.{name}_timeout_s" for name in ("start", "request")),
    "cluster.collective_timeout_s",
    "data.max_prompt_tokens",
    *(f"reward.{name}" for name in ("deadline_s", "memory_mib")),
    "evaluation.samples",
    "checkpoint.every",
    "checkpoint.keep",
    "guard.patience",
    *(f"preflight.{name}_s" for name in ("timeout", "clock_skew")),
    "cluster.nodes",
    "cluster.start_timeout_s",
)
_POSITIVE_OR_NULL = (
    *("data.limit", "sft.limit", "evaluation.limit", "rollout.mismatch_gate"),
    "guard.entropy_low",
    "guard.entropy_high",
    *(f"{section}.skip_grad" for section in _OPTIMIZERS),
)
_NOT_NEGATIVE = (
    "algorithm.iterations",
    "algorithm.rl_steps",
    "algorithm.updates_per_step",
    "algorithm.clip_low",
    "algorithm.clip_high",
    *(f"algorithm.{name}" for name in ("overlong_buffer", "kl_coefficient", "entropy_coefficient", "off_policy_mask")),
    "actor.optimizer_offload",
    "fp8.first_bf16_layers",
    "fp8.last_bf16_layers",
    "rft.min_tokens",
    "rft.max_per_problem",
    "rft.earlier_iterations",
    "rollout.max_lag",
    "rollout.overprovision",
    "evaluation.every",
    "evaluation.temperature",
    "checkpoint.keep_best",
    "reward.workers",
    "reward.format_penalty",
    "cluster.threads",
    "cluster.gpus_per_node",
    "rollout.nodes",
    "cluster.stop_margin_s",
    *(f"cluster.slurm.{name}" for name in ("signal_s", "cpus_per_node", "retries", "backoff_s")),
    *(f"guard.stall_{name}" for name in ("factor", "floor_s")),
    *(f"preflight.{name}_gib" for name in ("run", "tmp", "shm")),
    *(f"cluster.gpu.{rate.name}" for rate in fields(GpuConfig) if rate.name != "name"),
    *(f"{section}.{name}" for section in _OPTIMIZERS for name in ("warmup_updates", "weight_decay", "clip_grad")),
)
_SHARES = (
    *("rft.share", "rollout.top_p", "evaluation.top_p", "algorithm.hard_threshold"),
    *(f"reward.max_{kind}_share" for kind in ("failure", "unparsable")),
)
_MOST_PROCESSES = 10**6  # more than anybody has: looking for a legal layout of a slip of the finger would take days
_LARGEST = 2**31 - 1  # of whole numbers: more is a slip of the finger, and overflows somewhere later
_MOST_WORKERS = 1024  # of them each is a process
_MOST_BUCKET_MIB = 16384  # two are held, of whole size: beyond it nothing is faster, and memory is not to be had
_COLDEST, _HOTTEST = 1e-3, 1e3  # beyond, logits divided by a temperature leave fp32's range or differ by rounding only
_LONGEST_S = 1e8  # three years; some times more, and torch's clocks overflow
_LEAST_THRESHOLD = 1e-6  # below the doubles' precision, counting up to the samples that it takes would never end
_BELOW_ONE = tuple(f"{section}.{name}" for section in _OPTIMIZERS for name in ("beta1", "beta2"))


def check_values(config: Config, elsewhere: bool = False) -> None:
    """Every rule that needs nothing but the configuration. Raises UserError.

    `elsewhere`: the run is for other machines, so the programs that it names needn't be on this one.
    """
    values = flat(config)
    _check_writable(values)
    _check_ranges(values)
    _check_machine(config, elsewhere)
    _check_reward_and_guard(config)
    _check_algorithm(config)
    _check_experts(config)
    _check_evaluation(config)
    _check_rollout(config, elsewhere)


def _check_writable(values: Mapping[str, Any]) -> None:
    """Numbers that can be counted with, and texts that a file can hold."""
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}={value} must be a finite number.")
        if type(value) is int and abs(value) > _LARGEST:
            raise UserError(f"{key}={value} must be at most {_LARGEST}.")
        if key.endswith("_s") and not key.endswith("_gb_s") and value > _LONGEST_S:
            raise UserError(f"{key}={value:g} must be at most {_LONGEST_S:g} seconds.")
        if isinstance(value, str) and not value.strip():
            raise UserError(f"{key} is empty: give {key}=VALUE, or leave it out.")
        if not all(map(_is_text, value if isinstance(value, list) else [value])):
            raise UserError(
                f"{key}={value!r} holds bytes that are no UTF-8 text: rename what it names, or run with LC_ALL=C.UTF-8."
            )


def _check_ranges(values: Mapping[str, Any]) -> None:
    """What each key alone may be."""
    for key, choices in _CHOICES.items():
        if values[key] not in choices:
            raise UserError(f"{key}={values[key]} is not one of {', '.join(filter(None, choices))}.")
    for key in _POSITIVE:
        if values[key] <= 0:
            raise UserError(f"{key}={values[key]} must be greater than 0.")
    for key in _POSITIVE_OR_NULL:
        if values[key] is not None and values[key] <= 0:
            raise UserError(f"{key}={values[key]} must be greater than 0, or null for none.")
    sizes = [
        key for key, value in values.items() if key.startswith("model.architecture.") and isinstance(value, int | float)
    ]
    for key in (*_NOT_NEGATIVE, *sizes):
        if values[key] < 0:
            raise UserError(f"{key}={values[key]} must not be negative.")
    for key in _SHARES:
        if values[key] is not None and not 0 < values[key] <= 1:
            raise UserError(f"{key}={values[key]} must be above 0 and at most 1.")
    for key in _BELOW_ONE:
        if not 0 <= values[key] < 1:
            raise UserError(f"{key}={values[key]} must be at least 0 and below 1.")
    for key in ("rollout.temperature", "evaluation.temperature"):
        if values[key] and not _COLDEST <= values[key] <= _HOTTEST:
            raise UserError(f"{key}={values[key]} must be from {_COLDEST} to {_HOTTEST:g}.")


def _check_machine(config: Config, elsewhere: bool) -> None:
    """Of `run`, `layout`, `actor`, `preflight`, `cluster` and `tracking`: what the machines have to bear."""
    if config.run.seed < 0:
        raise UserError(f"run.seed={config.run.seed} must be at least 0.")
    if (count := processes(config.layout)) > _MOST_PROCESSES:
        raise UserError(f"layout.* has {count} processes (tp x pp x cp x dp): at most {_MOST_PROCESSES}.")
    if config.actor.optimizer_offload > 1:
        raise UserError(f"actor.optimizer_offload={config.actor.optimizer_offload} is a share: at most 1.")
    if (share := config.preflight.slow_link) is not None and not 0 <= share <= 1:
        raise UserError(f"preflight.slow_link={share} is a share: from 0 (no link is slow) to 1, or null.")
    interface = config.cluster.interface
    if interface is not None and not re.fullmatch(r"[^\s/:]{1,15}", interface):
        raise UserError(f"cluster.interface={interface!r} is no name of an interface: such as ib0, from `ip address`.")
    if config.tracking.wandb_project and not elsewhere and find_spec("wandb") is None:
        raise UserError(
            f"tracking.wandb_project={config.tracking.wandb_project} needs wandb, which is not installed: "
            "`pip install wandb`, or set tracking.wandb_project=null."
        )


def _check_reward_and_guard(config: Config) -> None:
    reward, guard = config.reward, config.guard
    if reward.workers > _MOST_WORKERS:
        raise UserError(f"reward.workers={reward.workers} must be at most {_MOST_WORKERS}, or 0: one a core.")
    if reward.correct <= reward.wrong:
        raise UserError(
            f"reward.correct={reward.correct} must be above reward.wrong={reward.wrong}: the policy learns what is "
            "rewarded more."
        )
    low, high = guard.entropy_low, guard.entropy_high
    if low is not None and high is not None and low >= high:
        raise UserError(f"guard.entropy_low={low} must be below guard.entropy_high={high}.")


def _is_text(value: Any) -> bool:
    """Whether a value, if it is a text, can be written: Python has bytes of a path that are no UTF-8 as surrogates."""
    return not isinstance(value, str) or value == value.encode(errors="replace").decode()


def _check_algorithm(config: Config) -> None:
    algorithm = config.algorithm
    if algorithm.group_size < 2:
        raise UserError(
            f"algorithm.group_size={algorithm.group_size} must be at least 2: an advantage compares responses."
        )
    if algorithm.dual_clip != 0 and algorithm.dual_clip <= 1:
        raise UserError(f"algorithm.dual_clip={algorithm.dual_clip} must be above 1, or 0 for none.")
    trajectories = algorithm.prompts_per_step * algorithm.group_size
    if algorithm.updates_per_step > trajectories:
        raise UserError(
            f"algorithm.updates_per_step={algorithm.updates_per_step} is more than the {trajectories} trajectories "
            "of a step (prompts_per_step x group_size)."
        )
    if algorithm.prompts_per_step > algorithm.sampled_per_step * algorithm.sampling_rounds:
        raise UserError(
            f"algorithm.prompts_per_step={algorithm.prompts_per_step} can never be filled: sampled_per_step x "
            f"sampling_rounds is {algorithm.sampled_per_step * algorithm.sampling_rounds}."
        )
    if algorithm.hard_threshold is not None and algorithm.hard_threshold < _LEAST_THRESHOLD:
        raise UserError(
            f"algorithm.hard_threshold={algorithm.hard_threshold} leaves no expert: no problem is sampled so often; it "
            f"is {_LEAST_THRESHOLD} at least, or null for every problem."
        )
    if algorithm.importance_cap < 1:
        raise UserError(f"algorithm.importance_cap={algorithm.importance_cap} must be at least 1.")
    if algorithm.importance != "none" and algorithm.old_logprobs != "trainer":
        raise UserError(
            f"algorithm.importance={algorithm.importance} weighs the trainer's logprobs against the engine's: set "
            "algorithm.old_logprobs=trainer."
        )
    if algorithm.overlong_buffer >= config.rollout.max_tokens:
        raise UserError(
            f"algorithm.overlong_buffer={algorithm.overlong_buffer} must be below rollout.max_tokens="
            f"{config.rollout.max_tokens}."
        )
    if algorithm.iterations == 0 and config.sft.demonstrations is None:
        raise UserError("algorithm.iterations=0 leaves nothing to do: set it to 1 or more, or set sft.demonstrations.")


def _check_experts(config: Config) -> None:
    """What the exploitation takes of an exploration."""
    rft, last = config.rft, config.algorithm.rl_steps - 1
    if rft.steps and (len(rft.steps) != 2 or not 0 <= rft.steps[0] <= rft.steps[1]):
        raise UserError(f"rft.steps={rft.steps} must be [first, last], RL steps from 0 on, or [].")
    if rft.steps and last >= 0 and rft.steps[0] > last:
        raise UserError(f"rft.steps={rft.steps} leaves no expert: an exploration's RL steps are from 0 to {last}.")
    if rft.min_tokens > config.rollout.max_tokens:
        raise UserError(
            f"rft.min_tokens={rft.min_tokens} leaves no expert: a response has at most rollout.max_tokens="
            f"{config.rollout.max_tokens}."
        )


def _check_evaluation(config: Config) -> None:
    """What is measured, and which policies are kept for it."""
    evaluation, checkpoint, steps = config.evaluation, config.checkpoint, config.algorithm.rl_steps
    if not evaluation.k:
        raise UserError("evaluation.k=[] names no k of pass@k: give some, such as [1,8,32].")
    for k in evaluation.k:
        if not 1 <= k <= evaluation.samples:
            raise UserError(f"evaluation.k holds {k}: pass@k needs 1 <= k <= evaluation.samples={evaluation.samples}.")
    for step in checkpoint.policy_steps:
        if not 1 <= step <= steps:
            raise UserError(f"checkpoint.policy_steps holds {step}: a step is from 1 to algorithm.rl_steps={steps}.")
    if checkpoint.keep_best and config.data.validation is None:
        raise UserError(
            f"checkpoint.keep_best={checkpoint.keep_best} needs data.validation: it says which are the best."
        )


def _check_rollout(config: Config, elsewhere: bool) -> None:
    rollout = config.rollout
    if rollout.bucket_mib > _MOST_BUCKET_MIB:
        raise UserError(f"rollout.bucket_mib={rollout.bucket_mib} must be at most {_MOST_BUCKET_MIB}.")
    if not elsewhere:
        check_python(rollout, elsewhere=False)
    if rollout.engine == "sglang" and not rollout.endpoints:
        _check_sglang(rollout)
    if rollout.engine == "embedded" and rollout.endpoints:
        raise UserError("rollout.endpoints names running servers: set rollout.engine=sglang to use them.")
    if rollout.quantization == "fp8":
        _check_fp8_engines(config)
    if rollout.sleep and (rollout.endpoints or rollout.max_lag > 0):
        key = "endpoints" if rollout.endpoints else "max_lag"
        reason = "a server that others started" if rollout.endpoints else "an engine that generates meanwhile"
        raise UserError(f"rollout.sleep=true with rollout.{key}: {reason} cannot sleep while the policy trains.")
    for endpoint in rollout.endpoints:
        try:
            parts = urlsplit(endpoint)
            usable = parts.scheme in ("http", "https") and parts.hostname is not None and parts.port != 0
        except ValueError:  # a port that is no number or too large, half an IPv6 address
            usable = False
        if not usable:
            raise UserError(f"rollout.endpoints holds {endpoint!r}: an endpoint looks like http://HOST:PORT.")
        if parts.username is not None or parts.password is not None:
            raise UserError("rollout.endpoints holds a password: give the key in the environment (RLOOP_ENGINE_KEY).")


def _check_fp8_engines(config: Config) -> None:
    if config.rollout.engine != "sglang":
        raise UserError("rollout.quantization=fp8 needs rollout.engine=sglang: the embedded engine has no FP8.")
    if config.precision == "fp32":
        raise UserError("rollout.quantization=fp8 needs precision=bf16 or an FP8 one: SGLang has FP8 beside bf16 only.")
    if config.algorithm.old_logprobs == "trainer" and config.algorithm.importance == "none":
        raise UserError(
            "rollout.quantization=fp8 samples from another policy than the one that is trained: correct for that with "
            "algorithm.importance=truncate (or algorithm.old_logprobs=engine)."
        )


def _check_lag(config: Config, deterministic: bool) -> None:
    rollout, algorithm = config.rollout, config.algorithm
    if rollout.max_lag > 1 and not rollout.partial:
        raise UserError(
            f"rollout.max_lag={rollout.max_lag} needs rollout.partial=true: a sync would wait for all of it."
        )
    behind = rollout.max_lag > 0 or rollout.partial or rollout.overprovision > 0
    if behind and algorithm.old_logprobs == "trainer" and algorithm.importance == "none":
        raise UserError(
            "rollout.max_lag, rollout.partial and rollout.overprovision train on samples of older weights: correct for "
            "that with algorithm.importance=truncate (or algorithm.old_logprobs=engine)."
        )
    if deterministic and (rollout.partial or rollout.overprovision > 0):
        raise UserError(
            "rollout.partial and rollout.overprovision depend on time: set run.deterministic=false to use them."
        )


def check_python(rollout: RolloutConfig, elsewhere: bool) -> None:
    """The interpreter that starts SGLang is given, and is there unless it is `elsewhere`. Raises UserError."""
    if rollout.engine != "sglang" or rollout.endpoints:
        return
    if rollout.python is None:
        raise UserError(
            "rollout.engine=sglang needs rollout.python=.venv-sglang/bin/python (`make install-sglang` makes it), or "
            "rollout.endpoints=[http://HOST:PORT,...] for running servers."
        )
    if not elsewhere and shutil.which(rollout.python) is None:
        raise UserError(f"rollout.python={rollout.python} is no program: `make install-sglang` makes one with SGLang.")


def _check_sglang(rollout: RolloutConfig) -> None:
    """What is needed to start SGLang servers."""
    for key, groups in (("dp", rollout.dp), ("ep", rollout.ep)):
        if rollout.tp % groups:
            raise UserError(f"rollout.{key}={groups} must divide rollout.tp={rollout.tp}: they are groups of its GPUs.")
    if any(device < 0 for device in rollout.gpus):
        raise UserError(f"rollout.gpus={rollout.gpus} holds a negative number: devices are numbered from 0 on.")
    if rollout.memory_fraction is not None and not 0 < rollout.memory_fraction < 1:
        raise UserError(f"rollout.memory_fraction={rollout.memory_fraction} must be above 0 and below 1.")
    named, needed = len(set(rollout.gpus)), rollout.engines * rollout.tp
    if 0 < named < needed:
        raise UserError(f"rollout.gpus names {named} devices; rollout.engines x rollout.tp is {needed}.")


def check_device(config: Config, device: str) -> None:
    """What `device`, cpu or cuda, can't do. Raises UserError."""
    actor, rollout = config.actor, config.rollout
    _check_lag(config, platform.deterministic(config.run.deterministic, device))
    starts_sglang = rollout.engine == "sglang" and not (rollout.endpoints or rollout.nodes)
    if device == "cuda" and starts_sglang and 0 in rollout.gpus:
        raise UserError(
            f"rollout.gpus={rollout.gpus} has device 0, from which the weights are sent, and NCCL refuses two ranks on "
            "one GPU: leave it empty for engines on the trainer's GPUs, or name devices behind them."
        )
    if device == "cpu" and actor.optimizer_offload > 0:
        raise UserError(f"actor.optimizer_offload={actor.optimizer_offload} needs a GPU to free: set it to 0.")
    if device == "cpu" and actor.precision_aware_optimizer:
        raise UserError("actor.precision_aware_optimizer=true needs Transformer Engine's Adam: set it to false.")
    if actor.precision_aware_optimizer and not actor.distributed_optimizer:
        raise UserError("actor.precision_aware_optimizer=true needs actor.distributed_optimizer=true.")
    if actor.optimizer_offload > 0 and not actor.distributed_optimizer:
        raise UserError(
            f"actor.optimizer_offload={actor.optimizer_offload} needs actor.distributed_optimizer=true: without it "
            "Megatron loses track of the weights that are offloaded."
        )
    if actor.precision_aware_optimizer and actor.optimizer_offload > 0:
        raise UserError(
            "actor.precision_aware_optimizer=true saves nothing beside "
            f"actor.optimizer_offload={actor.optimizer_offload}: Megatron keeps fp32 moments then; set one of the two."
        )
    check_precision(config.precision, config.fp8, device, actor)
    if device == "cuda" and config.precision == "fp32" and config.layout.cp > 1:
        raise UserError(
            f"layout.cp={config.layout.cp} at precision=fp32: on a GPU, Transformer Engine splits no sequence in fp32; "
            "set layout.cp=1 or precision=bf16."
        )
    if device == "cpu" and config.rollout.quantization == "fp8" and not config.rollout.endpoints:
        raise UserError("rollout.quantization=fp8: SGLang has FP8 on a GPU only; set rollout.quantization=none here.")


def check_model(config: Config, model: Path) -> Architecture:
    """The sizes of the folder `model`: its `config.json` goes with the layout, the precision and the lengths.

    Raises UserError where it does not.
    """
    sizes = read_hf_config(model)
    check_architecture(config.model.architecture, sizes, model / "config.json")
    return check_sizes(config, sizes, str(model / "config.json"))


def check_sizes(config: Config, values: Mapping[str, Any], model: str) -> Architecture:
    """`check_model` for the keys of a config.json, which came from `model`."""
    kind = values.get("model_type")
    if config.model.family == "auto" and kind not in (None, *_FAMILIES):
        raise UserError(f"{model}: model_type is {kind!r}; supported are {', '.join(_FAMILIES)}.")
    sizes = Architecture.of(values, model)
    if broken := broken_rule(config.layout, sizes):
        legal = nearest_legal(config.layout, sizes)
        raise UserError(
            f"{broken} (model {model}): the nearest legal layout of {processes(legal)} processes has "
            f"{' '.join(overrides('layout', config.layout, legal))}."
        )
    check_bf16_layers(config.fp8, sizes.layers, config.layout.pp)
    check_fp8_sizes(config.precision, values, config.layout.tp, config.layout.etp)
    rollout = config.rollout
    if rollout.engine == "sglang" and (rollout.dp > 1 or rollout.quantization == "fp8"):
        check_engine(sizes, rollout)
    if config.actor.routing_replay != "none" and not sizes.experts:
        raise UserError(
            f"actor.routing_replay={config.actor.routing_replay} needs a model with experts; {model} has none."
        )
    longest = config.data.max_prompt_tokens + config.rollout.max_tokens
    if longest > (sizes.positions or longest):
        raise UserError(
            f"data.max_prompt_tokens + rollout.max_tokens = {longest} is more than the {sizes.positions} positions of "
            f"{model}: lower one of them."
        )
    return sizes


def stated_sizes(model: ModelConfig) -> tuple[dict[str, Any], str]:
    """The keys of `model.path`'s config.json where there is one, else those of `model.architecture`; and where from.

    Raises UserError where there is neither, or where they contradict each other.
    """
    stated = {key: value for key, value in vars(model.architecture).items() if value is not None}
    folder = Path(model.path)
    if (folder / "config.json").is_file():
        found = read_hf_config(folder)
        check_architecture(model.architecture, found, folder / "config.json")
        return found, str(folder / "config.json")
    if not stated:
        raise UserError(
            f"the model's sizes are not known: model.path={model.path} holds no config.json and model.architecture is "
            "empty: give one of them, e.g. model=qwen2.5_7b."
        )
    return stated, "model.architecture"


def warnings(config: Config, problems: int) -> list[str]:
    """What is legal but surely unwanted, with the numbers; `problems` is the size of the training set."""
    return [
        *idle_gpus(config),
        *split_groups(config),
        *_keys_of_sglang(config.rollout),
        *_nucleus(config),
        *_groups_of_no_use(config),
        *_empty_expert_sets(config, problems),
    ]


def _keys_of_sglang(rollout: RolloutConfig) -> list[str]:
    usual = RolloutConfig()
    keys = ("tp", "dp", "ep", "memory_fraction", "gpus", "server_args")
    given = [f"rollout.{key}={getattr(rollout, key)}" for key in keys if getattr(rollout, key) != getattr(usual, key)]
    if rollout.engine == "sglang" or not given:
        return []
    return [f"{', '.join(given)}: for rollout.engine=sglang only; the embedded engine goes without."]


def _nucleus(config: Config) -> list[str]:
    if config.rollout.top_p == 1:
        return []
    return [
        f"rollout.top_p={config.rollout.top_p:g} never samples what is unlikely, and the ratios of the update are of "
        "the whole vocabulary: the gradient is biased. The paper samples with 1."
    ]


def _groups_of_no_use(config: Config) -> list[str]:
    algorithm = config.algorithm
    asked, trained = algorithm.sampled_per_step, algorithm.prompts_per_step
    if config.rft.enabled or algorithm.dynamic_sampling or asked <= trained:
        return []
    return [
        f"algorithm.sampled_per_step={asked}: without dynamic sampling and RFT only algorithm.prompts_per_step="
        f"{trained} of these groups are trained on; set both alike."
    ]


def _empty_expert_sets(config: Config, problems: int) -> list[str]:
    algorithm = config.algorithm
    if not (config.rft.enabled and algorithm.iterations and algorithm.rl_steps and algorithm.hard_threshold):
        return []
    needed = samples_needed(algorithm.hard_threshold)
    drawn = algorithm.rl_steps * algorithm.sampled_per_step * algorithm.sampling_rounds
    visits = -(-drawn // problems)
    sampled = visits * algorithm.group_size
    if sampled >= needed:
        return []
    return [
        f"a phase samples a problem at most {sampled} times ({algorithm.rl_steps} steps x {algorithm.sampling_rounds} "
        f"rounds x {algorithm.sampled_per_step} / {problems} problems x {algorithm.group_size} responses), but a hard "
        f"problem with one success has at least {needed} samples (1/{needed} < algorithm.hard_threshold="
        f"{algorithm.hard_threshold}): the expert sets will be empty."
    ]
