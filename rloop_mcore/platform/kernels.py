"""CUDA's way to the same numbers with less traffic of memory; elsewhere, torch's operations as they stand."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in fp32, of matrices. On CUDA it is never rounded to bf16 in between."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, where `total` is fp32. On CUDA in the product's own kernel."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


def fused(function: Callable[..., T]) -> Callable[..., T]:
    """The function; where its first argument is on CUDA, in as few kernels as torch.compile finds."""

    @wraps(function)
    def call(first: torch.Tensor, *others: Any) -> T:
        return (_compiled(function) if first.is_cuda else function)(first, *others)

    return call


@cache
def _compiled(function: Callable[..., T]) -> Callable[..., T]:
    return torch.compile(function, dynamic=True)
