"""Build rank 0's part of tiny policies at layouts, no process but this one: `try_layouts.py JSON`.

JSON is a list of layouts, each with its model. The last line of the output is a list: null, or what Megatron raised.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from rloop_mcore import platform

platform.setup("cpu", 1)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.identity_op import IdentityOp  # noqa: E402
from megatron.core.transformer.transformer_block import (  # noqa: E402
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402


def transformer_config(layout: dict[str, Any], model: dict[str, Any]) -> TransformerConfig:
    pipeline: dict[str, Any] = {}
    if layout["stages"]:
        split = [["decoder"] * layers for layers in layout["stages"]]
        split[0], split[-1] = ["embedding", *split[0]], [*split[-1], "loss"]
        pipeline = {"pipeline_model_parallel_layout": split}
    return TransformerConfig(
        num_layers=model["layers"],
        hidden_size=32,
        num_attention_heads=model["heads"],
        num_query_groups=model["kv_heads"],
        ffn_hidden_size=model["ffn"],
        num_moe_experts=model["experts"] or None,
        moe_ffn_hidden_size=model["expert_ffn"] or None,
        moe_token_dispatcher_type="alltoall",
        gated_linear_unit=True,
        add_bias_linear=False,
        tensor_model_parallel_size=layout["tp"],
        pipeline_model_parallel_size=layout["pp"],
        virtual_pipeline_model_parallel_size=layout["vpp"] if layout["vpp"] > 1 else None,
        context_parallel_size=layout["cp"],
        expert_model_parallel_size=layout["ep"],
        expert_tensor_parallel_size=layout["etp"],
        sequence_parallel=layout["sp"],
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        **pipeline,
    )


def build(layout: dict[str, Any], model: dict[str, Any]) -> None:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout["tp"],
        pipeline_model_parallel_size=layout["pp"],
        virtual_pipeline_model_parallel_size=layout["vpp"] if layout["vpp"] > 1 else None,
        context_parallel_size=layout["cp"],
        expert_model_parallel_size=layout["ep"],
        expert_tensor_parallel_size=layout["etp"],
        create_gloo_process_groups=False,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    config = transformer_config(layout, model)
    layer = get_gpt_layer_local_spec(num_experts=model["experts"] or None)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = IdentityOp
    layer.submodules.self_attention.submodules.core_attention = IdentityOp  # ours is another one
    for virtual in range(layout["vpp"]):
        stage = virtual if layout["vpp"] > 1 else None
        layers = [layer] * get_num_layers_to_build(config, vp_stage=stage)
        spec = TransformerBlockSubmodules(layer_specs=layers, layer_norm=IdentityOp)
        chunk = GPTModel(config, spec, vocab_size=64 * layout["tp"], max_sequence_length=64, vp_stage=stage)
        if model["experts"] and not layout["sp"]:  # refused only once tokens come
            route(chunk)


def route(chunk: GPTModel) -> None:
    """Show an expert layer tokens. Its all-to-all fails here, without other ranks; raises only what comes before."""
    try:
        chunk.decoder.layers[0].mlp(torch.zeros(4, 1, 32))
    except ValueError as error:
        if "sequence parallelism" in str(error):
            raise
    except (AttributeError, RuntimeError, TypeError):
        pass


def main() -> None:
    verdicts = []
    for layout in json.loads(sys.argv[1]):
        world = layout["tp"] * layout["pp"] * layout["cp"] * layout["dp"]
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
        try:
            build(layout, layout["model"])
            verdicts.append(None)
        except (AssertionError, RuntimeError, ValueError) as error:
            verdicts.append(f"{type(error).__name__}: {error}")
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    print(json.dumps(verdicts))


if __name__ == "__main__":
    main()
