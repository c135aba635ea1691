"""AdamW with its learning-rate schedule: Megatron's distributed optimizer, fresh for every phase."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo  # the first optimizer would import it, after the garbage collector was told what stays
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from rloop_mcore.config import ActorConfig, Config, OptimizerConfig
from rloop_mcore.platform.precision import optimizer_settings, parameter_dtype


def learning_rate(config: OptimizerConfig, update: int, total_updates: int) -> float:
    """The rate of update `update` (from 0): linear warm-up to `lr`, then constant or cosine to 0 at `total_updates`."""
    if update < config.warmup_updates:
        return config.lr * (update + 1) / config.warmup_updates
    if config.schedule == "constant":
        return config.lr
    progress = (update - config.warmup_updates) / max(1, total_updates - config.warmup_updates)
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True)
class StepResult:
    """grad_norm: before clipping, over the whole model. skipped: the weights were left as they are."""

    grad_norm: float
    lr: float
    skipped: bool


class PolicyOptimizer:
    """Optimizer state and schedule position of one phase over the DDP-wrapped chunks."""

    def __init__(
        self, chunks: list[DistributedDataParallel], config: OptimizerConfig, total_updates: int, run: Config
    ) -> None:
        """`config`: the phase's; `run` says in which precision and where the state lives."""
        self._config = config
        dtype = parameter_dtype(run.precision)
        self._total_updates = total_updates
        self.update = 0  # position in the schedule
        self.steps = 0  # Adam's: the updates that were not skipped
        self.megatron = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=config.lr,
                weight_decay=config.weight_decay,
                adam_beta1=config.beta1,
                adam_beta2=config.beta2,
                adam_eps=config.eps,
                clip_grad=config.clip_grad,
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=run.actor.distributed_optimizer,
                **_placement(run.actor),
                **optimizer_settings(run.precision, run.fp8),
            ),
            chunks,
        )
        allocate_state(self.megatron)

    def step(self, loss: float) -> StepResult:
        """Update the weights from the finished gradients.

        A loss or gradient norm that is not finite, or a norm over `skip_grad`, leaves them alone, and Adam's state too.
        Every rank decides alike: `loss` is the global one and the norm is reduced over all ranks.
        """
        rate = learning_rate(self._config, self.update, self._total_updates)
        self.update += 1
        for group in self.megatron.param_groups:
            group["lr"] = rate
            # Megatron leaves it to its own scheduler to honour this: 0 for norms and biases, 1 for the rest.
            group["weight_decay"] = self._config.weight_decay * group["wd_mult"]
        self.megatron.prepare_grads()
        norm = float(self.megatron.get_grad_norm())
        gate = math.inf if self._config.skip_grad is None else self._config.skip_grad
        if not (math.isfinite(norm) and math.isfinite(loss) and norm <= gate):
            return StepResult(norm, rate, skipped=True)
        if self._config.clip_grad > 0:
            for optimizer in self.megatron.chained_optimizers:
                decoupled = optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
                clip_grad_by_total_norm_fp32(optimizer.get_parameters(), self._config.clip_grad, norm, decoupled)
        self.megatron.step_with_ready_grads()
        self.steps += 1
        return StepResult(norm, rate, skipped=False)


def _placement(actor: ActorConfig) -> dict[str, Any]:
    """Megatron's settings that save GPU memory."""
    settings: dict[str, Any] = {}
    if actor.optimizer_offload > 0:
        settings |= {"optimizer_cpu_offload": True, "optimizer_offload_fraction": actor.optimizer_offload}
    if actor.precision_aware_optimizer:
        settings |= {"use_precision_aware_optimizer": True, "exp_avg_dtype": torch.bfloat16}
        # The lower halves of main weights that Transformer Engine can keep instead of them cannot be loaded again.
        settings |= {"exp_avg_sq_dtype": torch.bfloat16, "store_param_remainders": False}
    return settings


def allocate_state(megatron: MegatronOptimizer) -> None:
    """Give every parameter its (zero) Adam state now: Megatron can neither save nor load one that isn't there."""
    for optimizer in megatron.chained_optimizers:
        inner = optimizer.optimizer
        if optimizer.init_state_fn is None:
            # Where no parameter has a copy in fp32, Megatron looks for one all the same when it loads a checkpoint.
            inner.param_update_in_fp32 = bool(inner.param_to_fp32_param)
            _step_nowhere(inner)
        elif optimizer.config.use_precision_aware_optimizer:  # Megatron's call lacks an argument
            for parameter in (parameter for group in inner.param_groups for parameter in group["params"]):
                inner.initialize_state(parameter, store_param_remainders=False)
        else:
            optimizer.init_state_fn(inner, optimizer.config)
        if isinstance(inner, torch.optim.AdamW):  # other Adams keep the step in the group
            for group in inner.param_groups:
                group |= {"fused": True, "foreach": False}  # one pass over the state; Megatron has no key for it
            for state in inner.state.values():
                state["step"] = torch.zeros((), dtype=torch.float32)


def copy_to_offloaded(megatron: MegatronOptimizer) -> None:
    """Give the CPU's main weights the values of the GPU's: Megatron's way to load a checkpoint stops at these."""
    for optimizer in megatron.chained_optimizers:
        for parameter, copy in getattr(optimizer.optimizer, "gpu_params_map_cpu_copy", {}).items():
            if parameter not in optimizer.optimizer.param_to_fp32_param:
                copy.data.copy_(parameter.data)


def count_in_parts(megatron: MegatronOptimizer) -> None:
    """After a checkpoint: Megatron's optimizer over CPU and GPU would set its parts' step counts back to that of the
    checkpoint before every step, since a setting of its own overrules theirs."""
    for optimizer in megatron.chained_optimizers:
        if hasattr(optimizer.optimizer, "sub_optimizers"):
            for group in optimizer.optimizer.param_groups:
                group.pop("step", None)


def _step_nowhere(offloaded: Any) -> None:
    """Megatron's optimizer over CPU and GPU makes its state in a step: one along zero gradients, not counted."""
    rates = [(group["lr"], group["weight_decay"]) for group in offloaded.param_groups]
    for group in offloaded.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    offloaded.step()
    offloaded.zero_grad()
    for group, (rate, decay) in zip(offloaded.param_groups, rates, strict=True):
        group |= {"lr": rate, "weight_decay": decay}
    for part in offloaded.sub_optimizers:
        for holder in (*part.param_groups, *part.state.values()):
            if "step" in holder:
                holder["step"] = 0 * holder["step"]
