"""The trained policy: Megatron-Core's model, schedule, optimizer and checkpoints behind `protocols.Actor`."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from rloop_mcore import platform
from rloop_mcore.actor import checkpoint, parallel
from rloop_mcore.actor.conduct import Conducted, collective
from rloop_mcore.actor.losses import Loss, fine_tuning_loss, policy_update_loss
from rloop_mcore.actor.metrics import Report, reduce_reports
from rloop_mcore.actor.model import build_model, packed_sequences, wrap_for_training
from rloop_mcore.actor.optimizer import PolicyOptimizer
from rloop_mcore.actor.packing import MicroBatch, Row, Share, micro_batches, padding_share
from rloop_mcore.actor.pending_save import PendingSave
from rloop_mcore.actor.reference import Reference
from rloop_mcore.actor.routing import Recording, Replaying, RoutingReplay
from rloop_mcore.algorithm.aggregation import sequence_weights, trajectory_weights
from rloop_mcore.config import Config, OptimizerConfig
from rloop_mcore.platform import fp8_simulation
from rloop_mcore.platform.precision import reset_scales, token_multiple
from rloop_mcore.types import Example, Experience, Policy, Trajectory

if TYPE_CHECKING:
    from rloop_mcore.protocols import ScatteredTensors, WeightBridge

# What the last stage makes of a micro-batch, from its (logprobs, entropy) [n]
Result = Callable[[MicroBatch, torch.Tensor, torch.Tensor], Any]


class MegatronActor(Conducted):
    """Built on every rank after `platform.setup`; then rank 0 calls its methods and the others `follow()`."""

    def __init__(self, config: Config, bridge: WeightBridge) -> None:
        parallel.initialize(config.layout, config.run.seed, config.cluster.collective_timeout_s)
        super().__init__(config.cluster.collective_timeout_s)
        if platform.deterministic(config.run.deterministic, platform.device().type):
            platform.make_deterministic()
        self._config = config
        self._bridge = bridge
        architecture = bridge.architecture()
        self._vocabulary = int(architecture["gpt"]["vocab_size"])
        self._chunks = build_model(architecture, config)
        self._wrapped = wrap_for_training(self._chunks, config)
        self._optimizer: PolicyOptimizer | None = None
        self._reference: Reference | None = None
        self._pending_save: PendingSave | None = None
        self._routing: RoutingReplay | None = None
        if config.actor.routing_replay == "first_forward":
            transformer = architecture["transformer"]
            self._routing = RoutingReplay(self._chunks, transformer["moe_router_topk"], transformer["num_moe_experts"])

    @collective
    def begin(self, policy: Path, optimizer: OptimizerConfig, total_updates: int) -> None:
        """Take the weights of an HF folder and a fresh optimizer with its schedule over `total_updates`."""
        self._optimizer = self._reference = None
        gc.collect()  # the last phase's state goes before this one's comes
        gc.freeze()  # Megatron collects garbage at every save: leave what outlives the phase out of it
        fp8_simulation.reset(self._chunks)
        reset_scales(self._chunks, self._config.precision)  # before the weights: those in FP8 bring their scale
        self._bridge.load(self._chunks, policy)
        self._optimizer = PolicyOptimizer(self._wrapped, optimizer, total_updates, self._config)
        if self._config.algorithm.kl_coefficient > 0:
            self._reference = Reference(self._chunks)

    @collective
    def make_room(self) -> None:
        """Give back the device memory that torch keeps for later: engines on the same devices need it now."""
        torch.cuda.empty_cache()  # does nothing where CUDA is not in use

    @collective
    def logprobs(self, batch: Sequence[Trajectory], of_reference: bool) -> list[tuple[float, ...]]:
        """log pi(response) [response] of each trajectory under the policy, or under the one `begin` took.

        At the sampling temperature. The result is that of every rank. With `actor.routing_replay`, the policy's choices
        of experts are what the next updates on these trajectories repeat.
        """
        rows = [Row(t.prompt_ids, t.response_ids) for t in batch]
        values = torch.zeros(sum(len(row.response_ids) for row in rows), device=platform.device())

        def keep(micro_batch: MicroBatch, logprobs: torch.Tensor, entropy: torch.Tensor) -> None:
            if parallel_state.get_tensor_model_parallel_rank() == 0:
                values[micro_batch.slots] = logprobs

        batches, temperature = micro_batches(rows, self._share()), self._config.rollout.temperature
        if of_reference:
            assert self._reference is not None, "a reference is kept where algorithm.kl_coefficient > 0"
            with self._reference.in_place_of(self._chunks):
                self._schedule(batches, keep, temperature, forward_only=True)
        elif self._routing is not None:
            recording = self._routing.recording(rows)
            self._schedule(batches, keep, temperature, forward_only=True, routing=recording)
            self._routing.keep(recording, batch, rows)
        else:
            self._schedule(batches, keep, temperature, forward_only=True)
        torch.distributed.all_reduce(values)
        return [tuple(part.tolist()) for part in values.cpu().split([len(row.response_ids) for row in rows])]

    @collective
    def update(self, batch: Sequence[Experience]) -> dict[str, float]:
        """One DAPO update on a mini-batch.

        Metrics over the response tokens, before the update: loss, entropy, clip_fraction, ratio_mean, ratio_max,
        mismatch_mean and mismatch_max (of |trainer - engine logprob|), mismatch_k3 (of KL(engine || trainer)), those of
        the options that are on, tokens; and padding_share, grad_norm, lr, skipped (0 or 1), seconds_update.
        """
        algorithm = self._config.algorithm
        lengths = [len(e.trajectory.response_ids) for e in batch]
        weights = sequence_weights(lengths, algorithm.aggregation, self._config.rollout.max_tokens)
        rows = [
            Row(
                e.trajectory.prompt_ids,
                e.trajectory.response_ids,
                weight,
                e.advantage,
                e.old_logprobs,
                e.trajectory.logprobs,
                e.reference_logprobs,
            )
            for e, weight in zip(batch, weights, strict=True)
        ]
        loss = policy_update_loss(algorithm, parallel_state.get_context_parallel_group())
        routing = None if self._routing is None else self._routing.replaying([e.trajectory for e in batch])
        return self._train(rows, loss, self._config.rollout.temperature, routing)

    @collective
    def fine_tune(self, batch: Sequence[Example], loss: str) -> dict[str, float]:
        """One SFT update on the responses. `loss`: token_mean, or reward_weighted (RLoop, eq. 6).

        Metrics: loss, tokens, and `update`'s last five.
        """
        weights = [1.0] * len(batch)
        if loss == "reward_weighted":
            weights = trajectory_weights([len(e.response_ids) for e in batch], [e.reward for e in batch])
        rows = [Row(e.prompt_ids, e.response_ids, w) for e, w in zip(batch, weights, strict=True)]
        return self._train(rows, fine_tuning_loss, temperature=1.0)

    @collective
    def export(self) -> ScatteredTensors:
        """Stream the weights as (HF name, tensor to be gathered); rank 0 must take all of them before its next call."""
        return self._bridge.export(self._chunks)

    @collective
    def save_policy(self, path: Path) -> Policy:
        """Write the weights as an HF folder, atomically. The result is rank 0's."""
        tensors = self._bridge.export(self._chunks)
        try:
            return self._bridge.save(tensors, path) if torch.distributed.get_rank() == 0 else Policy(path, "")
        finally:
            for _ in tensors:  # where the disk is full, rank 0 too gathers to the end what the others do
                pass

    @collective
    def start_save(self, path: Path) -> None:
        """Copy weights, optimizer, schedule and RNG and begin to write them as a Megatron checkpoint; one at a time."""
        if self._pending_save is not None:
            raise RuntimeError("a checkpoint is being written: finish_save() comes first")
        self._pending_save = PendingSave(path, self._wrapped, self._begun())

    @collective
    def finish_save(self) -> None:
        """Wait until what `start_save` began is whole and durable at its path. Raises Fault where it can't be."""
        if self._pending_save is None:
            raise RuntimeError("no checkpoint is being written: start_save() comes first")
        pending, self._pending_save = self._pending_save, None
        # Half: a rank that waited in vain can still tell the others, who wait for it.
        pending.finish(self._config.cluster.collective_timeout_s / 2)

    @collective
    def load(self, path: Path) -> None:
        """Restore what was saved, at any layout; `begin` came before, with the phase's optimizer and length."""
        checkpoint.load(path, self._wrapped, self._begun())

    def _begun(self) -> PolicyOptimizer:
        if self._optimizer is None:
            raise RuntimeError("the actor has no weights yet: begin() comes first")
        return self._optimizer

    def _share(self) -> Share:
        layout = self._config.layout
        return Share(
            rank=parallel_state.get_data_parallel_rank(),
            ranks=parallel_state.get_data_parallel_world_size(),
            cp_rank=parallel_state.get_context_parallel_rank(),
            cp=layout.cp,
            max_tokens=self._config.actor.micro_batch_tokens,
            multiple=token_multiple(self._config.precision) * (layout.tp if layout.sp else 1),
            count_multiple=layout.pp if layout.vpp > 1 else 1,
        )

    def _train(
        self, rows: Sequence[Row], loss: Loss, temperature: float, routing: Replaying | None = None
    ) -> dict[str, float]:
        """Forward and backward over the micro-batches, then one optimizer step."""
        started = time.perf_counter()
        optimizer, share = self._begun(), self._share()
        for chunk in self._wrapped:
            chunk.zero_grad_buffer()
        optimizer.megatron.zero_grad()
        batches = micro_batches(rows, share)
        reports: list[Report] = []

        def result(
            batch: MicroBatch, logprobs: torch.Tensor, entropy: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
            total, report = loss(batch, logprobs, entropy)
            reports.append(report)
            tokens = torch.full((), report.tokens, dtype=torch.int, device=total.device)
            return total, tokens, {}

        self._schedule(batches, result, temperature, forward_only=False, routing=routing)
        if routing is not None:
            routing.finish(self._chunks)
        metrics = reduce_reports(reports)
        step = optimizer.step(metrics["loss"])
        fp8_simulation.finish_update(self._chunks)
        return metrics | {
            "padding_share": padding_share(rows, batches, share),
            "grad_norm": step.grad_norm,
            "lr": step.lr,
            "skipped": float(step.skipped),
            "seconds_update": time.perf_counter() - started,
        }

    def _schedule(
        self,
        batches: list[MicroBatch],
        result: Result,
        temperature: float,
        forward_only: bool,
        routing: Recording | Replaying | None = None,
    ) -> None:
        """Megatron's pipeline schedule over the micro-batches; on the last stage each ends in `result`."""

        def forward_step(data: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            batch = next(data)
            if routing is not None:
                routing.before(model, batch)
            hidden = model(batch.tokens[None], None, None, packed_seq_params=packed_sequences(batch))
            if routing is not None:
                routing.after(model, batch)

            def of_hidden(hidden: torch.Tensor, non_loss_data: bool = False) -> Any:
                chunk = self._chunks[-1]
                return result(batch, *chunk.token_logprobs(hidden, batch, self._vocabulary, temperature))

            return hidden, of_hidden

        # All of them now: a copy waits for the kernels that were launched before it, and holds up those that follow.
        batches = [batch.to(platform.device()) for batch in batches]
        layout = self._config.layout
        iterators = [iter(batches) for _ in self._chunks]
        for chunk in self._chunks:
            # Asks for recomputation, nothing else. Without a backward pass Transformer Engine would keep the FP8 scales
            # of this pass for the recomputations of the next update.
            chunk.decoder.training = not forward_only
        with torch.set_grad_enabled(not forward_only):
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterators if layout.vpp > 1 else iterators[0],
                model=self._wrapped,
                num_microbatches=len(batches),
                seq_length=batches[0].tokens.numel() * layout.cp,
                micro_batch_size=1,
                forward_only=forward_only,
                collect_non_loss_data=forward_only,
            )
