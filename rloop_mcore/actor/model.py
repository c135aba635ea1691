"""The policy network: Megatron-Core's GPTModel behind one builder."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig

from rloop_mcore import platform
from rloop_mcore.actor.logprobs import token_logprobs
from rloop_mcore.actor.packing import MicroBatch
from rloop_mcore.config import Config, LayoutConfig
from rloop_mcore.platform import fp8_simulation, precision
from rloop_mcore.platform.layer_spec import accumulate_in_gemms, block_spec, transformer_settings

_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


class PolicyChunk(GPTModel):
    """A pipeline stage's chunk of the policy. The last one ends in hidden states: see `token_logprobs`."""

    def _postprocess(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states

    def token_logprobs(
        self, hidden: torch.Tensor, batch: MicroBatch, vocabulary: int, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logprobs and entropies [n] of the micro-batch's response tokens; `hidden` is the last chunk's output."""
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden)[batch.positions, 0]
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden[batch.positions, 0])
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        group = parallel_state.get_tensor_model_parallel_group()
        return token_logprobs(hidden, weight, batch.targets, vocabulary, temperature, group)


def build_model(architecture: dict[str, Any], config: Config) -> list[PolicyChunk]:
    """This rank's pipeline chunks of the policy, with random weights that `WeightBridge.load` then replaces.

    `architecture` is `WeightBridge.architecture()`. The vocabulary is padded with rows to a multiple of tp.
    """
    layout = config.layout
    settings = _transformer_config(architecture["transformer"], config)
    gpt = architecture["gpt"]
    gpt = gpt | {"vocab_size": -(-gpt["vocab_size"] // layout.tp) * layout.tp}
    chunks = []
    for virtual_stage in range(layout.vpp):
        stage = virtual_stage if layout.vpp > 1 else None
        chunks.append(
            PolicyChunk(
                config=settings,
                transformer_layer_spec=block_spec(settings, stage),
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
                parallel_output=True,
                vp_stage=stage,
                **gpt,
            )
        )
        for parameter in chunks[-1].parameters():
            if parameter.device.type != platform.device().type:  # the router's, on CUDA
                parameter.data = parameter.data.to(platform.device())
        if layout.etp != layout.tp:
            _mark_experts(chunks[-1])
    if config.fp8.simulate:
        fp8_simulation.simulate_fp8(chunks, config.precision, config.fp8, settings.num_layers)
    return chunks


def wrap_for_training(chunks: list[PolicyChunk], config: Config) -> list[DistributedDataParallel]:
    """Megatron's DDP around each chunk: gradients in fp32 buffers, summed over the data-parallel ranks."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=config.actor.distributed_optimizer,
        **precision.ddp_settings(config.precision, config.fp8),
    )
    accumulate_in_gemms(chunks)
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize_model_grads
    return [DistributedDataParallel(chunk.config, settings, chunk) for chunk in chunks]


def packed_sequences(batch: MicroBatch) -> PackedSeqParams:
    """What attention and rotary positions need to know of a micro-batch.

    Not where padded sequences would lie: up to 2.17 Transformer Engine compares those with these in every layer, and
    waits for the GPU to do so.
    """
    longest = max(batch.lengths)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=batch.boundaries,
        cu_seqlens_kv=batch.boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _mark_experts(chunk: PolicyChunk) -> None:
    """Sum the gradients of experts over their own data-parallel ranks; Megatron 0.16 does so for ep > 1 only."""
    for name, parameter in chunk.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]


def _transformer_config(fields: dict[str, Any], config: Config) -> TransformerConfig:
    layout, dtype = config.layout, precision.parameter_dtype(config.precision)
    return TransformerConfig(
        **(
            fields
            | transformer_settings()
            | precision.transformer_settings(config.precision, config.fp8)
            | _RECOMPUTE[config.actor.recompute]
            | _pipeline(layout, dtype)
        ),
        tensor_model_parallel_size=layout.tp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        sequence_parallel=layout.sp,
        activation_func=F.silu,  # `honour` lets no other pass
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        moe_enable_routing_replay=config.actor.routing_replay != "none",
        # Megatron 0.16 marks parameters as split over TP while it draws them: unmarked, the gradient norm is wrong.
        perform_initialization=True,
        calculate_per_token_loss=True,
    )


def _pipeline(layout: LayoutConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The stages. Megatron's interleaved schedule over two stages is silently wrong with batched p2p calls."""
    if layout.pp == 1:
        return {}
    stages = [["decoder"] * layers for layers in layout.stages]
    stages[0], stages[-1] = ["embedding", *stages[0]], [*stages[-1], "loss"]
    return {
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "pipeline_model_parallel_layout": stages,
        "pipeline_dtype": dtype,
        "overlap_p2p_comm": layout.vpp > 1,
        "batch_p2p_comm": layout.vpp == 1,
    }
