"""FP8 in NumPy from the formats' definitions: every value is decoded, and the nearest one is searched."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

E4M3, E5M2 = (4, 3), (5, 2)  # exponent bits, mantissa bits


def positive_values(format: tuple[int, int]) -> np.ndarray:
    """All finite values >= 0 in order of their codes; the index is the code. (OFP8: E4M3 has no infinity.)"""
    exponents, mantissas = format
    bias = 2 ** (exponents - 1) - 1
    values = []
    for code in range(127 if format == E4M3 else 124):
        exponent, mantissa = divmod(code, 2**mantissas)
        fraction = mantissa / 2**mantissas
        values.append(fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias))
    return np.array(values)


def nearest(x: np.ndarray, format: tuple[int, int]) -> np.ndarray:
    """The nearest value of the format; of two, the one with the even code; beyond the largest, the largest."""
    values = positive_values(format)
    size = np.abs(x).astype(np.float64)
    above = np.clip(np.searchsorted(values, size), 1, len(values) - 1)
    low, high = size - values[above - 1], values[above] - size
    up = (high < low) | ((high == low) & (above % 2 == 0))
    return np.copysign(values[np.where(up, above, above - 1)], x)


def tiles(shape: tuple[int, ...], tile: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    for i in range(0, shape[0], tile[0]):
        for j in range(0, shape[1], tile[1]):
            yield slice(i, i + tile[0]), slice(j, j + tile[1])


def tiled(x: np.ndarray, format: tuple[int, int], tile: tuple[int, int]) -> np.ndarray:
    """Through FP8 and back, with the largest power-of-two scale that keeps a tile in range."""
    out = np.empty_like(x)
    for where in tiles(x.shape, tile):
        amax = np.abs(x[where]).astype(np.float64).max()
        scale = 2.0 ** np.floor(np.log2(positive_values(format)[-1] / amax)) if amax > 0 else 1.0
        out[where] = nearest(x[where] * scale, format) / scale
    return out


def per_tensor(x: np.ndarray, format: tuple[int, int], amax: float | None = None) -> np.ndarray:
    """Through FP8 and back with the scale max / amax, in float32 as the hardware does."""
    largest = np.float32(positive_values(format)[-1])
    scale = largest / np.float32(np.abs(x).max() if amax is None else amax)
    return nearest(x * scale, format).astype(np.float32) * (np.float32(1) / scale)


def operand(x: np.ndarray, precision: str, role: str, summed: int, amax: float | None = None) -> np.ndarray:
    """What a GEMM that sums over dimension `summed` sees of x; `role`: input, weight or gradient."""
    hybrid = precision in ("fp8_delayed", "fp8_tensorwise")
    format = E5M2 if role == "gradient" and hybrid else E4M3
    if hybrid:
        return per_tensor(x, format, amax)
    if precision == "fp8_blockwise" and role == "weight":
        return tiled(x, format, (128, 128))
    block = 128 if precision == "fp8_blockwise" else 32
    return tiled(x, format, (1, block) if summed == 1 else (block, 1))
