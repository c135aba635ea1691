"""FP8 in blocks: the values and scales against a formula in NumPy, what is quantised, and how it travels."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from rloop_mcore.rollout.buckets import Buffers
from rloop_mcore.rollout.checksums import ExpectedChecksums, KeptWeights
from rloop_mcore.rollout.fp8 import dequantize, quantize, quantized
from rloop_mcore.rollout.hashers import sglang_cpu_hasher

PLACE = "model.layers.0."


def _e4m3(code: int) -> float:
    """1 sign bit, 4 of exponent (bias 7), 3 of mantissa; no infinities (OFP8, section 5)."""
    sign, exponent, mantissa = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return float("nan")
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def _matrix() -> torch.Tensor:
    """Blocks of very different sizes, one of them zero."""
    torch.manual_seed(0)
    matrix = (
        torch.randn(256, 384).view(2, 128, 3, 128) * torch.tensor([[1.0, 30, 1e-6], [1e-3, 0, 700]])[:, None, :, None]
    )
    return matrix.view(256, 384)


def test_a_block_is_rounded_to_the_nearest_of_its_scale() -> None:
    matrix = _matrix()
    codes, scales = quantize(matrix)
    assert (codes.dtype, scales.dtype, scales.shape) == (torch.float8_e4m3fn, torch.float32, (2, 3))
    table = np.array([_e4m3(code) for code in range(256)], dtype=np.float32)
    numbers = np.array(sorted(set(table[~np.isnan(table)])))
    for row in range(2):
        for column in range(3):
            block = matrix[128 * row : 128 * row + 128, 128 * column : 128 * column + 128].numpy()
            found = codes[128 * row : 128 * row + 128, 128 * column : 128 * column + 128].view(torch.uint8).numpy()
            scale = np.float32(max(np.abs(block).max(), 1e-12)) / np.float32(448)
            assert scales[row, column].item() == scale
            exact = (block / scale).ravel()
            distance = np.abs(table[found].ravel() - exact)
            right = np.searchsorted(numbers, exact).clip(1, len(numbers) - 1)
            nearest = np.minimum(np.abs(numbers[right] - exact), np.abs(numbers[right - 1] - exact))
            np.testing.assert_array_equal(distance, nearest)


def test_transformers_reads_the_same_from_it() -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(fp8, "Fp8Dequantize"):
        pytest.skip("this transformers reads no FP8 checkpoint on a CPU")
    codes, scales = quantize(_matrix())
    read = fp8.Fp8Dequantize(None).convert({"weight$": codes, "weight_scale_inv": scales})["weight"]
    torch.testing.assert_close(dequantize(codes, scales), read.bfloat16(), rtol=0, atol=0)
    torch.testing.assert_close(read, _matrix(), rtol=0.07, atol=1e-3)


def test_a_matrix_of_part_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="128 x 100"):
        quantize(torch.zeros(128, 100))


def _stream() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    names = {
        "model.embed_tokens.weight": (64, 128),
        f"{PLACE}self_attn.q_proj.weight": (256, 128),
        f"{PLACE}self_attn.q_proj.bias": (255,),
        f"{PLACE}self_attn.k_proj.weight": (128, 128),
        f"{PLACE}self_attn.v_proj.weight": (128, 128),
        f"{PLACE}self_attn.o_proj.weight": (128, 256),
        f"{PLACE}self_attn.q_norm.weight": (64,),
        f"{PLACE}mlp.gate.weight": (4, 128),
        f"{PLACE}mlp.experts.0.gate_proj.weight": (128, 128),
        f"{PLACE}mlp.experts.0.down_proj.weight": (128, 128),
        "lm_head.weight": (64, 128),
    }
    return {name: torch.randn(shape).bfloat16() for name, shape in names.items()}


def test_the_matrices_of_the_layers_and_nothing_else_are_quantised() -> None:
    sent = list(quantized(iter(_stream().items())))
    matrices = [name for name in _stream() if name.endswith("_proj.weight")]
    assert [name for name, tensor in sent if tensor.dtype == torch.float8_e4m3fn] == matrices
    assert [name for name, tensor in sent if tensor.dtype == torch.float32] == [f"{n}_scale_inv" for n in matrices]
    assert [n for n, _ in sent if not n.endswith("_scale_inv")] == list(_stream())


@pytest.mark.parametrize("size", [1000, 70_000, 10**9])
def test_buckets_carry_each_tensor_in_its_own_dtype_at_a_place_it_can_be_read_from(size: int) -> None:
    sent = dict(quantized(iter(_stream().items())))
    arrived = {}
    for bucket in Buffers(size, host=True).fill(quantized(iter(_stream().items())), torch.bfloat16):
        end = 0
        for name, tensor in bucket.tensors:  # SGLang's FlattenedTensorBucket.empty refuses another place
            assert end % tensor.itemsize == 0
            data = bucket.data[end : end + tensor.nbytes]
            arrived[name] = data.clone().view(tensor.dtype).view(tensor.shape)
            end += tensor.nbytes
    assert list(arrived) == list(sent)
    assert all(arrived[name].dtype == tensor.dtype for name, tensor in sent.items())
    assert all(torch.equal(arrived[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in sent.items())


@pytest.mark.parametrize("bucket", [20_000, 10**9], ids=["scales in the next bucket", "one bucket"])
def test_the_checksum_of_a_fused_matrix_is_that_of_what_it_stands_for(bucket: int) -> None:
    """SGLang hashes values times scales in bfloat16 (utils/weight_checker.py)."""
    expected = ExpectedChecksums(KeptWeights(sglang_cpu_hasher, fused=True, query_heads=4, kv_heads=2))
    for _ in Buffers(bucket, host=True).fill(quantized(iter(_stream().items())), torch.bfloat16, [expected]):
        pass
    (found,) = expected.by_rank()
    parts = []
    for kind in "qkv":
        codes, scales = quantize(_stream()[f"{PLACE}self_attn.{kind}_proj.weight"])
        whole = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
        parts.append((codes.float() * whole).bfloat16())
    told = hashlib.sha256(torch.cat(parts).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    assert found[f"{PLACE}self_attn.qkv_proj.weight"] == told
    assert not any("scale" in name for name in found)
