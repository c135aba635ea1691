"""The reports of micro-batches, over all ranks, as one dictionary of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state


@dataclass(frozen=True)
class Report:
    """What the loss tells of a micro-batch: sums and maxima over its response tokens."""

    tokens: int
    sums: dict[str, torch.Tensor]
    maxima: dict[str, torch.Tensor]

    @classmethod
    def of(cls, sums: Mapping[str, torch.Tensor], maxima: Mapping[str, torch.Tensor]) -> Report:
        """Of values [n], one a response token."""
        tokens = len(next(iter(sums.values())))
        return cls(
            tokens,
            {name: values.detach().sum(dtype=torch.float64) for name, values in sums.items()},
            {name: values.detach().max() for name, values in maxima.items()} if tokens else {},
        )


def reduce_reports(reports: Sequence[Report]) -> dict[str, float]:
    """Collective: means over the response tokens of the global batch, maxima over them, and "tokens", their number.

    `reports` are those of this rank's micro-batches; only the ranks of the last pipeline stage have any.
    """
    if parallel_state.get_tensor_model_parallel_rank() > 0:
        reports = []  # the same as those of rank 0
    mine = _combine([{"tokens": r.tokens, "sums": _floats(r.sums), "maxima": _floats(r.maxima)} for r in reports])
    everyone: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    total = _combine(everyone)
    tokens = total["tokens"]
    means = {name: value / max(tokens, 1) for name, value in total["sums"].items()}
    return means | total["maxima"] | {"tokens": float(tokens)}


def _combine(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    sums: dict[str, float] = {}
    maxima: dict[str, float] = {}
    for part in parts:
        for name, value in part["sums"].items():
            sums[name] = sums.get(name, 0.0) + value
        for name, value in part["maxima"].items():
            maxima[name] = _greater(maxima.get(name, value), value)
    return {"tokens": sum(part["tokens"] for part in parts), "sums": sums, "maxima": maxima}


def _greater(a: float, b: float) -> float:
    """The maximum, NaN if one is."""
    return a if a != a or a > b else b


def _floats(values: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """One copy from the GPU for all of them."""
    if not values:
        return {}
    return dict(zip(values, torch.stack([value.double() for value in values.values()]).tolist(), strict=True))
