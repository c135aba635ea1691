"""Megatron's own buffers and optimizer state on the meta device, rank by rank: `megatron_sizes.py < JOBS`.

JOBS is a JSON list of {"architecture" (config.json's keys), "layout", "precision", "actor", "ranks" (null: all)}. This
one process plays each of them in turn, over fake process groups. The last line of the output is a list of lists, one
entry a rank.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rloop_mcore import platform

platform.setup("cpu", 1)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils._device import _device_constructors  # noqa: E402

from rloop_mcore.actor.model import build_model, wrap_for_training  # noqa: E402
from rloop_mcore.actor.optimizer import PolicyOptimizer  # noqa: E402
from rloop_mcore.config import ActorConfig, Config, LayoutConfig, OptimizerConfig  # noqa: E402
from rloop_mcore.planning.layouts import processes, stages  # noqa: E402
from rloop_mcore.weights.families import choose_family  # noqa: E402
from rloop_mcore.weights.family import HfConfig  # noqa: E402

_TYPES = {torch.float32: "torch.FloatTensor", torch.bfloat16: "torch.BFloat16Tensor"}  # as if on the CPU


class OnMeta(TorchFunctionMode):
    """Every new tensor is on the meta device, whichever device it was asked for."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _device_constructors():
            kwargs["device"] = torch.device("meta")
        return func(*args, **kwargs)


def fake_groups(layout: LayoutConfig, rank: int) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=processes(layout))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=True,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(0)


def gather_own(found: list[Any], own: Any, *_: Any, **__: Any) -> None:
    """Every other rank answers as this one does: they are asked which kinds of parameters there are."""
    found[:] = [own] * len(found)


def sizes(job: dict[str, Any], layout: LayoutConfig) -> dict[str, int]:
    """Of this rank: parameters, and the bytes of its weights, gradients and optimizer state."""
    hf = HfConfig(Path("config.json"), job["architecture"])
    architecture = choose_family(hf, job["architecture"]["model_type"]).architecture(hf)
    layout = replace(layout, stages=stages(layout, job["architecture"]["num_hidden_layers"]))
    config = Config(layout=layout, precision=job["precision"], actor=ActorConfig(**job["actor"]))
    with OnMeta():
        chunks = build_model(architecture, config)
        parameters = sum(p.numel() for chunk in chunks for p in chunk.parameters())
        wrapped = wrap_for_training(chunks, config)
        optimizer = PolicyOptimizer(wrapped, OptimizerConfig(), 1, config)
    buffers = [b for chunk in wrapped for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    weights = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for c in chunks for p in c.parameters()}
    state: dict[int, int] = {}
    for part in optimizer.megatron.chained_optimizers:
        mains = [p for group in part.optimizer.param_groups for p in group["params"]]
        mains = [p for p in mains if p.untyped_storage()._cdata not in weights]  # fp32: the parameters themselves
        moments = [m for s in part.optimizer.state.values() for key, m in s.items() if key != "step"]
        state |= {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*mains, *moments)}
    return {
        "parameters": parameters,
        "weights": sum(weights.values()),
        "gradients": sum(buffer.grad_data.untyped_storage().nbytes() for buffer in buffers),
        "optimizer": sum(state.values()),
    }


def main() -> None:
    new_group = dist.new_group
    dist.new_group = lambda *args, **kwargs: new_group(*args, **(kwargs | {"backend": "fake"}))
    dist.all_gather_object = gather_own
    torch.Tensor.type = lambda tensor: _TYPES[tensor.dtype]  # type: ignore[method-assign, assignment]
    platform._device = torch.device("meta")
    found = []
    for job in json.load(sys.stdin):
        layout, of_ranks = LayoutConfig(**job["layout"]), []
        for rank in job["ranks"] or range(processes(layout)):
            fake_groups(layout, rank)
            of_ranks.append(sizes(job, layout))
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
        found.append(of_ranks)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
