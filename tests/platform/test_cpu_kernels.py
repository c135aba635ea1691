"""RMSNorm, SwiGLU and packed rotary embedding of the CPU against torch's and Megatron's own, gradients included."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from naive_attention import cumulative, zigzag

from rloop_mcore import platform

platform.setup("cpu", threads=1)

from megatron.core.models.common.embeddings import rope_utils  # noqa: E402

from rloop_mcore.platform.cpu_kernels import (  # noqa: E402
    RmsNormFunction,
    packed_rope,
    positions,
    swiglu,
    weighted_swiglu,
)

equal = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


def gradients(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The output, then the gradient of each input under one fixed gradient of the output."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = function(*leaves)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
    output.backward(gradient.bfloat16().to(output.dtype))  # exact in every dtype
    return [output.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("shape", [(5, 1, 12), (3, 2, 4, 12)])
def test_rms_norm_is_torchs(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    ours = gradients(lambda x, w: RmsNormFunction.apply(x, w, 1e-2), x, weight)
    for mine, torchs in zip(ours, gradients(lambda x, w: F.rms_norm(x, (12,), w, 1e-2), x, weight), strict=True):
        equal(mine, torchs)


def test_rms_norm_of_bf16_is_rounded_once() -> None:
    x, weight = torch.randn(64, 48).bfloat16(), torch.randn(48).bfloat16()
    ours = gradients(lambda x, w: RmsNormFunction.apply(x, w, 1e-6), x, weight)
    exact = gradients(lambda x, w: F.rms_norm(x, (48,), w, 1e-6), x.double(), weight.double())
    for mine, reference in zip(ours, exact, strict=True):
        assert mine.dtype == torch.bfloat16
        torch.testing.assert_close(mine.double(), reference, rtol=2**-8, atol=2**-8)


def test_swiglu_is_silu_of_the_gate_times_up() -> None:
    x, bias, weights = (torch.randn(shape, dtype=torch.float64) for shape in ((6, 1, 10), (10,), (6, 1, 1)))

    def written_out(x: torch.Tensor, bias: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        gate, up = (x + bias).tensor_split(2, dim=-1)
        return weights * up * gate / (1 + (-gate).exp())

    for mine, reference in zip(
        gradients(weighted_swiglu, x, bias, weights), gradients(written_out, x, bias, weights), strict=True
    ):
        equal(mine, reference)
    equal(swiglu(x, None, False, False), written_out(x, torch.zeros(10), torch.ones(1)))


def megatrons_own_rope() -> Callable[..., torch.Tensor]:
    """Its loop over sequences, from a copy of the module that the shim has not touched."""
    spec = importlib.util.spec_from_file_location("untouched_rope_utils", str(rope_utils.__file__))
    assert spec is not None
    assert spec.loader is not None
    untouched: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(untouched)
    return untouched._apply_rotary_pos_emb_thd


@pytest.mark.parametrize("cp", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[16, 16, 16], [24, 8, 8, 40]], ids=["equal", "ragged"])
def test_packed_rope_is_megatrons(lengths: list[int], cp: int) -> None:
    freqs = torch.randn(max(lengths), 1, 1, 6, dtype=torch.float64).repeat(1, 1, 1, 2)
    for rank in range(cp):
        x = torch.randn(sum(lengths) // cp, 3, 12, dtype=torch.float64)
        group = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: cp)
        options = {"cu_seqlens": cumulative(lengths), "freqs": freqs, "mscale": 1.5, "cp_group": group}
        ours = gradients(lambda x, options=options: packed_rope(x, **options), x)
        own = gradients(lambda x, options=options: megatrons_own_rope()(x, **options), x)
        for mine, megatrons in zip(ours, own, strict=True):
            equal(mine, megatrons)


@pytest.mark.parametrize("cp", [1, 2])
def test_positions_start_anew_in_every_sequence(cp: int) -> None:
    lengths = [8, 4, 0, 12]
    within = torch.tensor([position for length in lengths for position in range(length)])
    for rank in range(cp):
        assert torch.equal(positions(cumulative(lengths), rank, cp), within[zigzag(lengths, rank, cp)])


def test_a_table_as_long_as_the_pack_still_starts_at_each_sequence() -> None:
    """Megatron's own reads such a table as angles of the whole pack."""
    x, freqs = torch.randn(8, 2, 4), torch.randn(8, 1, 1, 2).repeat(1, 1, 1, 2)
    alone = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    both = packed_rope(x, cumulative([4, 4]), freqs, cp_group=alone)
    second = packed_rope(x[4:], cumulative([4]), freqs, cp_group=alone)
    assert torch.equal(both[4:], second)
