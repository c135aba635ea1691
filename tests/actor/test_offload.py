"""Megatron's optimizer over CPU and GPU after a checkpoint; a stand-in counts as Transformer Engine's Adam does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from rloop_mcore import platform

platform.setup("cpu", threads=1)

from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer  # noqa: E402

from rloop_mcore.actor.optimizer import count_in_parts  # noqa: E402


class Counting(torch.optim.SGD):
    """A step is counted in the group, and does nothing else."""

    def count(self) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1


def test_steps_are_counted_on_from_a_checkpoint() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    hybrid = HybridDeviceOptimizer([weight], cpu_optimizer_cls=Counting, gpu_optimizer_cls=Counting, lr=0.1)
    hybrid.load_state_dict({"state": {}, "param_groups": [hybrid.state_dict()["param_groups"][0] | {"step": 5}]})
    megatron: Any = SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=hybrid)])
    count_in_parts(megatron)
    for _ in range(3):  # what its own step does, but for the copies from and to a GPU
        hybrid._sync_hdo_param_groups_to_sub_optimizers()
        for part in hybrid.sub_optimizers:
            part.count()
    assert [group["step"] for part in hybrid.sub_optimizers for group in part.param_groups] == [8]
