"""Two ranks of a tensor-parallel linear layer under the FP8 simulation; rank 0 writes what they hold together."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist

from rloop_mcore import platform
from rloop_mcore.config import Fp8Config

platform.setup("cpu", threads=1)

from fp8_models import linear  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402

from rloop_mcore.platform.fp8_simulation import finish_update, simulate_fp8  # noqa: E402


def gathered(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    parts = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts, dim)


def part(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    return tensor.chunk(2, dim)[dist.get_rank()].contiguous()


def product(parallel: str, sequence_parallel: bool) -> dict[str, torch.Tensor]:
    """Whole tensors from the ranks' parts; the shards are whole blocks of 32."""
    module = linear(parallel, 128, 192, tp=2, sequence_parallel=sequence_parallel)
    _simulate(module, "mxfp8")
    torch.manual_seed(3)
    x, gradient = torch.randn(64, 128), torch.randn(64, 192)
    column = parallel == "column"
    mine, my_gradient = (x, part(gradient, 1)) if column else (part(x, 1), gradient)
    if sequence_parallel:
        mine, my_gradient = (part(x, 0), my_gradient) if column else (mine, part(gradient, 0))
    mine = mine.unsqueeze(1).requires_grad_()
    out, _ = module(mine)
    out.backward(my_gradient.unsqueeze(1))
    out, d_input = out.squeeze(1), mine.grad.squeeze(1)
    if column:
        out = gathered(out, 1)
        d_input = gathered(d_input, 0) if sequence_parallel else d_input
    else:
        out = gathered(out, 0) if sequence_parallel else out
        d_input = gathered(d_input, 1)
    split = 0 if column else 1
    return {
        "x": x,
        "gradient": gradient,
        "full_weight": gathered(module.weight, split),
        "out": out.detach(),
        "input": d_input,
        "weight": gathered(module.weight.grad, split),
    }


def delayed() -> dict[str, Any]:
    """The scales on both ranks, where each saw other maxima."""
    rank = dist.get_rank()
    shared, expert = linear("row", 64, 64, tp=2), linear("column", 64, 64, tp=2, is_expert=True)
    for module in (shared, expert):
        _simulate(module, "fp8_delayed")
    shared.fp8_amax[1] = torch.tensor([[3.0, 1.0, 7.0], [2.0, 5.0, 0.0]][rank])
    expert.fp8_amax[1] = 1.0 + rank
    finish_update([shared, expert])
    return {
        "scales": gathered(shared.fp8_amax[:1], 0).tolist(),
        "expert_scales": gathered(expert.fp8_amax[:1], 0).tolist(),
    }


def _simulate(module: torch.nn.Module, precision: str) -> None:
    chunk, layer = torch.nn.Module(), torch.nn.Module()
    layer.inner, layer.layer_number = module, 1
    chunk.decoder = torch.nn.Module()
    chunk.decoder.layers = [layer]
    simulate_fp8([chunk], precision, Fp8Config(), num_layers=1)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    results: dict[str, Any] = {
        f"{parallel} sp={sp}": product(parallel, sp) for parallel in ("column", "row") for sp in (False, True)
    }
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=2, expert_model_parallel_size=2, expert_tensor_parallel_size=1
    )
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    results["delayed"] = delayed()
    if dist.get_rank() == 0:
        torch.save(results, sys.argv[1])
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
