"""Megatron's GPTModel from its own local layer spec, at any layout: what the bridge fills, without the actor."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from rloop_mcore import platform
from rloop_mcore.config import LayoutConfig

platform.setup("cpu", threads=1)

from megatron.core import parallel_state, tensor_parallel  # noqa: E402  (Megatron comes after setup)
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.transformer_block import (  # noqa: E402
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)


class Norm(torch.nn.RMSNorm):
    """In the parameters' dtype: Megatron's own wrapper of torch's norm stays fp32."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: Any) -> None:
        super().__init__(hidden_size, eps, dtype=config.params_dtype)


def open_groups(layout: LayoutConfig) -> None:
    """Megatron's groups; the default group is torchrun's, or one of this process alone."""
    if not dist.is_initialized():
        store = None if "RANK" in os.environ else dist.HashStore()
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    parallel_state.initialize_model_parallel(
        layout.tp,
        layout.pp,
        layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(0)


def build_chunks(architecture: dict[str, Any], layout: LayoutConfig, dtype: torch.dtype) -> list[GPTModel]:
    """This rank's chunks with random weights, for forward passes over whole sequences whatever `layout.cp` is."""
    config = TransformerConfig(
        **architecture["transformer"],
        activation_func=F.silu,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )
    rows = -(-architecture["gpt"]["vocab_size"] // layout.tp) * layout.tp
    gpt = architecture["gpt"] | {"vocab_size": rows}
    stages = range(layout.vpp) if layout.vpp > 1 else [None]
    return [_chunk(config, gpt, stage).eval() for stage in stages]


def _chunk(config: TransformerConfig, gpt: dict[str, Any], stage: int | None) -> GPTModel:
    layer = get_gpt_layer_local_spec(config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    if config.qk_layernorm:
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = Norm
    layers = get_num_layers_to_build(config, vp_stage=stage)
    virtual = {"ignore_virtual": False, "vp_stage": stage}
    return GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=Norm),
        pre_process=parallel_state.is_pipeline_first_stage(**virtual),
        post_process=parallel_state.is_pipeline_last_stage(**virtual),
        vp_stage=stage,
        **gpt,
    )


def in_ddp(chunks: list[GPTModel]) -> list[DistributedDataParallel]:
    """As for training: parameters and gradients in Megatron's buffers."""
    buffers = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    return [DistributedDataParallel(chunk.config, buffers, chunk) for chunk in chunks]


def logits_of(chunks: list[GPTModel], layout: LayoutConfig, ids: torch.Tensor) -> torch.Tensor:
    """Logits [batch, seq, padded vocabulary] on every rank; every data-parallel rank computes the same rows."""
    positions = torch.arange(ids.size(1)).expand_as(ids)
    group = parallel_state.get_pipeline_model_parallel_group()
    config, stages = chunks[0].config, layout.pp * layout.vpp
    hidden = torch.empty(ids.size(1), ids.size(0), config.hidden_size, dtype=config.params_dtype)
    for stage in range(stages):
        here = dist.get_rank(group) == stage % layout.pp
        if here:
            chunk = chunks[stage // layout.pp]
            chunk.set_input_tensor(None if stage == 0 else hidden)
            hidden = chunk(ids, positions, None).contiguous()
        elif stage == stages - 1:
            hidden = torch.empty(*ids.shape, chunks[0].vocab_size // layout.tp, dtype=config.params_dtype)
        dist.broadcast(hidden, group=group, group_src=stage % layout.pp)
    return tensor_parallel.gather_from_tensor_model_parallel_region(hidden)
