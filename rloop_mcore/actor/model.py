"""The policy network: Megatron-Core's GPTModel behind one builder."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from rloop_mcore.config import LayoutConfig
from rloop_mcore.platform.layer_spec import block_spec, transformer_settings


def build_model(
    architecture: dict[str, Any], layout: LayoutConfig, dtype: torch.dtype, recompute: str = "none"
) -> list[torch.nn.Module]:
    """This rank's pipeline chunks of the policy, with random weights that `WeightBridge.load` then replaces.

    `architecture` is `WeightBridge.architecture()`; `dtype` float32 or bfloat16; `recompute` none, selective or
    full. The vocabulary is padded with rows to a multiple of tp.
    """
    config = _transformer_config(architecture["transformer"], layout, dtype, recompute)
    gpt = dict(architecture["gpt"])
    gpt["vocab_size"] = padded_vocabulary(gpt["vocab_size"], layout.tp)
    model = GPTModel(
        config=config,
        transformer_layer_spec=block_spec(config),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        **gpt,
    )
    return [model]


def wrap_for_training(chunks: list[torch.nn.Module]) -> list[DistributedDataParallel]:
    """Megatron's DDP around each chunk: gradients in one fp32 buffer, summed over the data-parallel ranks."""
    config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize_model_grads  # type: ignore[union-attr]
    return [DistributedDataParallel(chunk.config, config, chunk) for chunk in chunks]


def padded_vocabulary(size: int, tp: int) -> int:
    """The smallest multiple of tp that holds `size` rows."""
    return -(-size // tp) * tp


def _transformer_config(
    fields: dict[str, Any], layout: LayoutConfig, dtype: torch.dtype, recompute: str
) -> TransformerConfig:
    recompute_fields: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective"},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    return TransformerConfig(
        **(fields | transformer_settings() | recompute_fields[recompute]),
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        sequence_parallel=layout.sp and layout.tp > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Megatron 0.16 marks parameters as split over TP while it draws them: unmarked, the gradient norm is wrong.
        perform_initialization=True,
        calculate_per_token_loss=True,
    )
