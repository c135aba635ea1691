"""A simulation of FP8 training's numerics: GEMM operands go through FP8 and back, in torch. It saves no time or memory.

Of a linear layer, y [tokens, out] = x [tokens, in] w^T [out, in], three GEMMs see quantised operands, as in Transformer
Engine: forward x w^T, input gradient g w, weight gradient g^T x. The products are summed in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from rloop_mcore.platform.precision import Fp8

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_INPUT, _WEIGHT, _GRADIENT = range(3)
_TOKENS_OR_OUT, _LAST = range(2)  # the dimension of an operand that a GEMM sums over


@dataclass(frozen=True)
class Recipe:
    """How operands are scaled; inputs and weights are E4M3.

    `block` elements along the dimension that the GEMM sums over share a power-of-two scale; 0: a tensor has one float32
    scale. `square_weights`: blocks of weights are block x block. `delayed`: the scale is the last update's.
    """

    gradient: torch.dtype
    block: int = 0
    square_weights: bool = False
    delayed: bool = False

    def quantize(self, x: torch.Tensor, operand: int, summed: int, amax: torch.Tensor | None = None) -> torch.Tensor:
        """Operand x [rows, columns] of a GEMM that sums over dimension `summed`, as the GEMM sees it, in float32."""
        dtype = self.gradient if operand == _GRADIENT else E4M3
        if self.block == 0:
            return through_fp8(x, dtype, amax=amax)
        if operand == _WEIGHT and self.square_weights:
            return through_fp8(x, dtype, (self.block, self.block))
        return through_fp8(x, dtype, (1, self.block) if summed == _LAST else (self.block, 1))


SIMULATED = {
    "fp8_delayed": Recipe(E5M2, delayed=True),
    "fp8_tensorwise": Recipe(E5M2),
    "fp8_blockwise": Recipe(E4M3, block=128, square_weights=True),
    "mxfp8": Recipe(E4M3, block=32),
}


def through_fp8(
    x: torch.Tensor, dtype: torch.dtype, tile: tuple[int, int] | None = None, amax: torch.Tensor | None = None
) -> torch.Tensor:
    """Quantise x [rows, columns] to `dtype` (round to nearest even, saturating) and back to float32.

    A `tile` (rows, columns) shares the largest power-of-two scale that keeps its values in range; tiles at the edge are
    smaller. Without: one scale, max(dtype) / amax, where `amax` [] is that of x if not given. Infinities and NaNs stay.
    """
    x = x.float()
    if x.numel() == 0:
        return x
    if tile is None:
        return _round(x, _scale(x.abs().amax() if amax is None else amax, dtype), dtype)
    rows, columns = x.shape
    padded = F.pad(x, (0, -columns % tile[1], 0, -rows % tile[0]))
    tiles = padded.unflatten(1, (-1, tile[1])).unflatten(0, (-1, tile[0]))  # [row tiles, rows, column tiles, columns]
    scale = _scale(tiles.abs().amax((1, 3), keepdim=True), dtype)
    scale = (scale.view(torch.int32) & 0x7F800000).view(torch.float32)  # the exponent alone
    return _round(tiles, scale, dtype).flatten(2).flatten(0, 1)[:rows, :columns]


def _scale(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    largest = torch.full_like(amax, torch.finfo(dtype).max)  # torch turns number / tensor into two roundings
    scale = (largest / amax).clamp(max=torch.finfo(torch.float32).max)
    return torch.where(amax.isfinite() & (amax > 0), scale, 1.0)


def _round(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    largest = torch.finfo(dtype).max
    rounded = (x * scale).clamp(-largest, largest).to(dtype).float() * scale.reciprocal()
    return torch.where(x.isfinite(), rounded, x)  # a saturated infinity would hide that the update must be skipped


def simulate_fp8(chunks: Iterable[torch.nn.Module], precision: str, fp8: Fp8, num_layers: int) -> None:
    """Make the linear layers inside the transformer layers of GPTModel chunks compute as in FP8, from now on.

    Layers count over all pipeline stages; the first and last `fp8.*_bf16_layers` of `num_layers`, the embedding,
    routers and the output layer stay as they are. With fp8_delayed, `finish_update` and `reset` drive the scales, which
    are buffers and so part of Megatron's checkpoints.
    """
    recipe = SIMULATED[precision]
    for chunk in chunks:
        for layer in chunk.decoder.layers:  # type: ignore[union-attr]
            if not fp8.first_bf16_layers < layer.layer_number <= num_layers - fp8.last_bf16_layers:
                continue
            linears = [m for m in layer.modules() if isinstance(m, ColumnParallelLinear | RowParallelLinear)]
            if not linears:
                raise RuntimeError(f"layer {layer.layer_number} has no Megatron linear layers to simulate FP8 in")
            for linear in linears:
                if recipe.delayed:  # [in use, of this update so far] x [input, weight, gradient]; 0: none yet
                    linear.register_buffer("fp8_amax", torch.zeros(2, 3, device=linear.weight.device))
                linear._forward_impl = partial(_forward, linear, recipe)


@torch.no_grad()
def finish_update(chunks: Iterable[torch.nn.Module]) -> None:
    """fp8_delayed: what this update's backward passes saw scales the next update. Collective; others: no effect.

    Ranks that hold parts or replicas of a layer agree on the maximum. A zero or non-finite one leaves the old.
    """
    shared: list[torch.Tensor] = []
    experts: list[torch.Tensor] = []
    for linear in _delayed(chunks):
        (experts if linear.is_expert else shared).append(linear.fp8_amax)
    tensor_and_data = parallel_state.get_amax_reduction_group(with_context_parallel=True)
    _agree(shared, [tensor_and_data])
    if experts:
        expert_tensor = parallel_state.get_expert_tensor_parallel_group()
        _agree(experts, [expert_tensor, parallel_state.get_expert_data_parallel_group()])


def reset(chunks: Iterable[torch.nn.Module]) -> None:
    """fp8_delayed: forget what was seen, as a new phase does; others: no effect."""
    for linear in _delayed(chunks):
        linear.fp8_amax.zero_()


def _delayed(chunks: Iterable[torch.nn.Module]) -> Iterator[Any]:
    return (module for chunk in chunks for module in chunk.modules() if hasattr(module, "fp8_amax"))


def _agree(buffers: list[torch.Tensor], groups: list[dist.ProcessGroup]) -> None:
    if not buffers:
        return
    seen = torch.stack([buffer[1] for buffer in buffers])
    seen = torch.where(seen.isfinite(), seen, torch.inf)  # a maximum over ranks may lose a NaN
    for group in groups:
        dist.all_reduce(seen, op=dist.ReduceOp.MAX, group=group)
    for buffer, new in zip(buffers, seen, strict=True):
        buffer[0] = torch.where(new.isfinite() & (new > 0), new, buffer[0])
        buffer[1] = 0.0


def _forward(
    linear: Any,
    recipe: Recipe,
    input: torch.Tensor,  # Megatron names it so
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group: dist.ProcessGroup | None = None,
    **_: Any,
) -> torch.Tensor:
    """In place of `_forward_impl` of Megatron's linear layers: input [..., in] -> [..., out], this rank's part."""
    if sequence_parallel:
        input = gather_from_sequence_parallel_region(input, group=tp_group)
    elif allreduce_dgrad:
        input = copy_to_tensor_model_parallel_region(input, group=tp_group)
    amax = linear.fp8_amax if recipe.delayed else None
    return _SimulatedLinear.apply(input, weight, bias, recipe, amax)


class _SimulatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        recipe: Recipe,
        amax: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recipe, ctx.amax = recipe, amax
        rows = x.flatten(0, -2)
        out = recipe.quantize(rows, _INPUT, _LAST, _amax_in_use(amax, _INPUT, rows)) @ (
            recipe.quantize(weight, _WEIGHT, _LAST, _amax_in_use(amax, _WEIGHT, weight)).t()
        )
        if bias is not None:
            out = out + bias.float()
        return out.to(x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x, weight), recipe = ctx.saved_tensors, ctx.recipe
        operands = (x.flatten(0, -2), weight, gradient.flatten(0, -2))

        def quantize(operand: int, summed: int) -> torch.Tensor:
            tensor = operands[operand]
            return recipe.quantize(tensor, operand, summed, _amax_in_use(ctx.amax, operand, tensor))

        d_input = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_input = quantize(_GRADIENT, _LAST) @ quantize(_WEIGHT, _TOKENS_OR_OUT)
            d_input = d_input.to(x.dtype).unflatten(0, x.shape[:-1])
        if ctx.needs_input_grad[1]:
            d_weight = (quantize(_GRADIENT, _TOKENS_OR_OUT).t() @ quantize(_INPUT, _TOKENS_OR_OUT)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            d_bias = operands[_GRADIENT].float().sum(0).to(gradient.dtype)
        if ctx.amax is not None:  # here and not in the forward pass, which recomputation repeats
            for operand, tensor in enumerate(operands):
                if tensor.numel():
                    ctx.amax[1, operand] = torch.maximum(ctx.amax[1, operand], tensor.abs().amax().float())
        return d_input, d_weight, d_bias, None, None


def _amax_in_use(amax: torch.Tensor | None, operand: int, tensor: torch.Tensor) -> torch.Tensor | None:
    """The last update's maximum; the tensor's own before there was one."""
    if amax is None or tensor.numel() == 0:
        return None
    return torch.where(amax[0, operand] > 0, amax[0, operand], tensor.abs().amax().float())
