"""What fused kernels do on CUDA, in few passes over memory for the CPU: RMSNorm, SwiGLU, packed rotary embedding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


class RmsNormFunction(torch.autograd.Function):
    """y = w x / rms(x), rms(x)^2 = mean(x^2) + eps; torch's own is seven operations that autograd differentiates."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x [..., hidden], weight [hidden] -> [..., hidden] in x's dtype; half precision is computed in fp32."""
        wide = _at_least_fp32(x)
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.size(-1))
        inverse_rms = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        return torch.mul(wide, inverse_rms).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """With n = x / rms and g = w dy: dx = (g - n mean(g n)) / rms, dw = sum(n dy)."""
        x, weight, inverse_rms = ctx.saved_tensors
        gradient = _at_least_fp32(gradients[0])
        normed = _at_least_fp32(x) * inverse_rms
        weight_gradient = (gradient * normed).flatten(0, -2).sum(0)
        scaled = gradient * weight
        mean = torch.linalg.vecdot(scaled, normed).div_(x.size(-1)).unsqueeze(-1)
        x_gradient = scaled.addcmul_(normed, mean, value=-1).mul_(inverse_rms)
        return x_gradient.to(x.dtype), weight_gradient.to(weight.dtype), None


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        activated = F.silu(gate)
        ctx.save_for_backward(x, activated)
        return activated * up

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        x, activated = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        x_gradient = torch.empty_like(x)
        gate_gradient, up_gradient = x_gradient.chunk(2, -1)
        torch.mul(activated, gradients[0], out=up_gradient)
        torch.mul(gradients[0], up, out=gate_gradient)
        torch.ops.aten.silu_backward.grad_input(gate_gradient, gate, grad_input=gate_gradient)
        return x_gradient


def swiglu(x: torch.Tensor, bias: torch.Tensor | None, *_: Any) -> torch.Tensor:
    """silu(gate) * up of x + bias = [gate, up] [..., 2 * ffn] -> [..., ffn]; Megatron's `bias_swiglu_impl`."""
    return _SwiGlu.apply(x if bias is None else x + bias)


def weighted_swiglu(x: torch.Tensor, bias: torch.Tensor | None, weights: torch.Tensor, *_: Any) -> torch.Tensor:
    """`swiglu`, each token times its routing weight [..., 1]; Megatron's `weighted_bias_swiglu_impl`."""
    return (swiglu(x, bias) * weights).to(x.dtype)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(gradients[0], cos, -sin), None, None


def packed_rope(
    x: torch.Tensor,
    cu_seqlens: torch.Tensor,
    freqs: torch.Tensor,
    rotary_interleaved: bool = False,
    mscale: float = 1.0,
    cp_group: torch.distributed.ProcessGroup | None = None,
    **unsupported: bool | None,
) -> torch.Tensor:
    """Rotary embedding in one piece; stands in for Megatron's `_apply_rotary_pos_emb_thd`, which loops over sequences.

    x [tokens of this rank, heads, head], cu_seqlens over all ranks, freqs [positions, 1, 1, head] -> x's shape.
    `freqs` starts at position 0 of each sequence, always: Megatron's own takes it for a table over the whole pack when
    it happens to be as long as the pack.
    """
    if rotary_interleaved or any(unsupported.values()) or freqs.size(-1) != x.size(-1):
        raise NotImplementedError("packed rotary embedding on the CPU: in halves, over the whole head")
    assert cp_group is not None
    index = positions(cu_seqlens, cp_group.rank(), cp_group.size())
    angles = freqs[:, 0, :, : x.size(-1) // 2]
    cos, sin = ((table * mscale).to(x.dtype)[index] for table in (angles.cos(), angles.sin()))
    return _Rotate.apply(x, cos, sin)


def positions(cu_seqlens: torch.Tensor, cp_rank: int, cp: int) -> torch.Tensor:
    """The position in its sequence of each token of a context-parallel rank, [tokens / cp], zig-zag where cp > 1."""
    chunks = cu_seqlens.diff().long() // (2 * cp if cp > 1 else 1)
    if cp > 1:
        starts = torch.stack([cp_rank * chunks, (2 * cp - 1 - cp_rank) * chunks], dim=1).flatten()
        chunks = chunks.repeat_interleave(2)
    else:
        starts = torch.zeros_like(chunks)
    shift = starts - (chunks.cumsum(0) - chunks)
    return torch.arange(int(chunks.sum())) + shift.repeat_interleave(chunks)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [tokens, heads, head], cos and sin [tokens, 1, head / 2] -> x's shape, contiguous."""
    first, second = x.chunk(2, -1)
    rotated = torch.empty(x.shape, dtype=x.dtype)
    left, right = rotated.chunk(2, -1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=right).addcmul_(first, sin)
    return rotated


def _at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
