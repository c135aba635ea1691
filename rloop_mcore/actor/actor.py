"""The trained policy: Megatron-Core's model, schedule, optimizer and checkpoints behind `protocols.Actor`."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from rloop_mcore import platform
from rloop_mcore.actor import checkpoint, parallel
from rloop_mcore.actor.batching import MicroBatch, micro_batches
from rloop_mcore.actor.conduct import Conducted, collective
from rloop_mcore.actor.losses import DAPO_METRICS, FINE_TUNING_METRICS, LossFunction, dapo_loss, fine_tuning_loss
from rloop_mcore.actor.metrics import MetricNames, reduce_reports
from rloop_mcore.actor.model import build_model, wrap_for_training
from rloop_mcore.actor.optimizer import PolicyOptimizer
from rloop_mcore.config import Config, OptimizerConfig
from rloop_mcore.types import Example, Policy, Trajectory

if TYPE_CHECKING:
    from rloop_mcore.protocols import NamedTensors, WeightBridge


class MegatronActor(Conducted):
    """Built on every rank after `platform.setup`; then rank 0 calls its methods and the others `follow()`."""

    def __init__(self, config: Config, bridge: WeightBridge) -> None:
        parallel.initialize(config.layout, config.run.seed, config.cluster.collective_timeout_s)
        super().__init__(config.cluster.collective_timeout_s)
        if platform.deterministic(config.run.deterministic):
            platform.make_deterministic()
        self._config = config
        self._bridge = bridge
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.precision]
        architecture = bridge.architecture()
        self._vocabulary = int(architecture["gpt"]["vocab_size"])
        self._chunks = build_model(architecture, config.layout, self._dtype, config.actor.recompute)
        self._wrapped = wrap_for_training(self._chunks)
        self._optimizer: PolicyOptimizer | None = None
        gc.freeze()  # Megatron collects garbage at every save: leave what lives for ever out of it

    @collective
    def begin(self, policy: Path, optimizer: OptimizerConfig, total_updates: int) -> None:
        """Take the weights of an HF folder and a fresh optimizer with its schedule over `total_updates`."""
        self._bridge.load(self._chunks, policy)
        self._optimizer = PolicyOptimizer(self._wrapped, optimizer, total_updates, self._dtype)

    @collective
    def update(self, batch: Sequence[Trajectory], advantages: Sequence[float]) -> dict[str, float]:
        """One DAPO update on a mini-batch; `advantages` [batch], one a trajectory.

        Metrics over the response tokens, before the update: loss, entropy, clip_fraction, ratio_mean, ratio_max,
        mismatch_mean and mismatch_max (of |trainer - engine logprob|), tokens; and grad_norm, lr, skipped (0 or 1),
        seconds_update.
        """
        algorithm, temperature = self._config.algorithm, self._config.rollout.temperature

        def loss(micro_batch: MicroBatch) -> LossFunction:
            return dapo_loss(
                micro_batch,
                self._vocabulary,
                temperature,
                algorithm.clip_low,
                algorithm.clip_high,
                algorithm.dual_clip,
            )

        return self._train(self._share(batch, advantages), loss, DAPO_METRICS)

    @collective
    def fine_tune(self, batch: Sequence[Example]) -> dict[str, float]:
        """One SFT update: token-mean NLL of the responses. Metrics: loss, tokens, and `update`'s last four."""

        def loss(micro_batch: MicroBatch) -> LossFunction:
            return fine_tuning_loss(micro_batch, self._vocabulary)

        return self._train(self._share(batch, None), loss, FINE_TUNING_METRICS)

    @collective
    def export(self) -> NamedTensors:
        """Stream the full weights as (HF name, tensor); rank 0 must take all of them before its next call."""
        return self._bridge.export(self._chunks)

    @collective
    def save_policy(self, path: Path) -> Policy:
        """Write the weights as an HF folder, atomically. The result is rank 0's."""
        tensors = self._bridge.export(self._chunks)
        if torch.distributed.get_rank() == 0:
            return self._bridge.save(tensors, path)
        for _ in tensors:
            pass
        return Policy(path, "")

    @collective
    def save(self, path: Path) -> None:
        """Write weights, optimizer, schedule and RNG as a Megatron checkpoint, atomically."""
        checkpoint.save(path, self._wrapped, self._begun())

    @collective
    def load(self, path: Path) -> None:
        """Restore what `save` wrote, at any layout; `begin` came before, with the phase's optimizer and length."""
        checkpoint.load(path, self._wrapped, self._begun())

    def _begun(self) -> PolicyOptimizer:
        if self._optimizer is None:
            raise RuntimeError("the actor has no weights yet: begin() comes first")
        return self._optimizer

    def _share(self, batch: Sequence[Trajectory | Example], advantages: Sequence[float] | None) -> list[MicroBatch]:
        return micro_batches(
            batch,
            advantages,
            rank=parallel_state.get_data_parallel_rank(),
            ranks=parallel_state.get_data_parallel_world_size(),
            max_tokens=self._config.actor.micro_batch_tokens,
            multiple=self._config.layout.tp if self._config.layout.sp else 1,
        )

    def _train(
        self, batches: list[MicroBatch], loss: Callable[[MicroBatch], LossFunction], names: MetricNames
    ) -> dict[str, float]:
        """Forward and backward over the micro-batches by Megatron's schedule, then one optimizer step."""
        started = time.perf_counter()
        optimizer = self._begun()
        for chunk in self._wrapped:
            chunk.zero_grad_buffer()
        optimizer.megatron.zero_grad()

        def forward_step(data: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[torch.Tensor, LossFunction]:
            micro_batch = next(data).to(platform.device())
            length = micro_batch.tokens.size(1)
            positions = torch.arange(length, device=micro_batch.tokens.device).expand_as(micro_batch.tokens)
            return model(micro_batch.tokens, positions, attention_mask=None), loss(micro_batch)

        size, length = batches[0].tokens.shape
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=self._wrapped,
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=size,
            forward_only=False,
        )
        metrics = reduce_reports(reports, names)
        result = optimizer.step(metrics["loss"])
        return metrics | {
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "skipped": float(result.skipped),
            "seconds_update": time.perf_counter() - started,
        }
