"""FP8 weights as the engines keep them: e4m3 values in blocks of 128 x 128, a scale each.

The convention of the FP8 checkpoints of DeepSeek-V3 and Qwen3: the matrices of the layers' linears are quantised; the
embeddings, the output layer, the norms, the biases and the router of a mixture of experts are not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from rloop_mcore.platform.precision import FP8_BLOCK

if TYPE_CHECKING:
    from rloop_mcore.protocols import NamedTensors

DTYPE = torch.float8_e4m3fn
SCALE_SUFFIX = "_scale_inv"  # of the name of a matrix: what its values are multiplied by
QUANTIZATION_CONFIG: Mapping[str, object] = {  # what config.json of such a checkpoint says
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
}

_LARGEST = torch.finfo(DTYPE).max  # 448
_SMALLEST = 1e-12  # stands for the largest value of a block of zeros
_QUANTIZED = re.compile(r"\.([qkvo]|gate|up|down)_proj\.weight$")


def quantize(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 [rows, columns], float32 scales [rows / 128, columns / 128]) of a matrix [rows, columns].

    The scale of a block is its largest absolute value over 448, the largest e4m3 (DeepSeek-V3's report,
    arXiv 2412.19437, section 3.3). Raises ValueError for a matrix that is not whole blocks.
    """
    rows, columns = matrix.shape
    if rows % FP8_BLOCK or columns % FP8_BLOCK:
        raise ValueError(f"FP8 wants matrices of whole blocks of {FP8_BLOCK} x {FP8_BLOCK}, got {rows} x {columns}")
    blocks = matrix.detach().float().view(rows // FP8_BLOCK, FP8_BLOCK, columns // FP8_BLOCK, FP8_BLOCK)
    scales = blocks.abs().amax(dim=(1, 3)).clamp(min=_SMALLEST) / _LARGEST
    values = (blocks / scales[:, None, :, None]).clamp(-_LARGEST, _LARGEST)  # the division may round above it
    return values.to(DTYPE).view(rows, columns), scales


def dequantize(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """bfloat16 [rows, columns] of what `quantize` gave: value times the scale of its block."""
    rows, columns = values.shape
    blocks = values.float().view(rows // FP8_BLOCK, FP8_BLOCK, columns // FP8_BLOCK, FP8_BLOCK)
    return (blocks * scales[:, None, :, None]).view(rows, columns).bfloat16()


def quantized(weights: NamedTensors) -> NamedTensors:
    """The stream with each matrix of a linear as its e4m3 values and, right behind, their scales."""
    for name, tensor in weights:
        if not _QUANTIZED.search(name):
            yield name, tensor
            continue
        values, scales = quantize(tensor if isinstance(tensor, torch.Tensor) else tensor.gather())
        yield name, values
        yield name + SCALE_SUFFIX, scales


def kept_as_sent(name: str, dtype: torch.dtype) -> bool:
    """Whether the tensor is of FP8's making, whose dtype is not that of the engine."""
    return dtype == DTYPE or name.endswith(SCALE_SUFFIX)
