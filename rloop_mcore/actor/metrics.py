"""The reports of micro-batches, over all ranks, as one dictionary of numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from rloop_mcore import platform


@dataclass(frozen=True)
class MetricNames:
    """What a loss reports: `sums` over response tokens, of which "tokens" is their number, and `maxima` over them."""

    sums: tuple[str, ...]
    maxima: tuple[str, ...] = ()


def reduce_reports(reports: list[torch.Tensor], names: MetricNames) -> dict[str, float]:
    """Collective: means over the response tokens of the global batch ("tokens" stays their number), and maxima.

    `reports` are those of this rank's micro-batches, each [len(sums) + len(maxima)] in the order of `names`; only the
    ranks of the last pipeline stage have any.
    """
    count = len(names.sums)
    mine = torch.zeros(count + len(names.maxima), dtype=torch.float64, device=platform.device())
    if reports and parallel_state.get_tensor_model_parallel_rank() == 0:
        stacked = torch.stack(reports).double()
        mine = torch.cat([stacked[:, :count].sum(0), stacked[:, count:].amax(0)])
    ranks = [mine]
    if dist.get_world_size() > 1:
        ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(ranks, mine)
    everyone = torch.stack(ranks)
    sums = dict(zip(names.sums, everyone[:, :count].sum(0).tolist(), strict=True))
    maxima = dict(zip(names.maxima, everyone[:, count:].amax(0).tolist(), strict=True)) if names.maxima else {}
    tokens = sums.pop("tokens")
    return {name: total / max(tokens, 1.0) for name, total in sums.items()} | maxima | {"tokens": tokens}
