"""Train the policies of the parity suite at several layouts of one number of ranks: `worker_parity.py JOBS OUT`.

JOBS is a JSON list of {"name", "model", "folder", "layout", "actor"}; OUT/NAME.pt gets what each came to. All layouts
go through one process group: starting processes would cost more than all the arithmetic.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rloop_mcore import platform

platform.setup("cpu", 1)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from parity_model import CLIP_HIGH, CLIP_LOW, DUAL_CLIP, TEMPERATURE, experiences  # noqa: E402

from rloop_mcore.actor import parallel  # noqa: E402
from rloop_mcore.actor.actor import MegatronActor  # noqa: E402
from rloop_mcore.config import (  # noqa: E402
    ActorConfig,
    AlgorithmConfig,
    ClusterConfig,
    Config,
    LayoutConfig,
    OptimizerConfig,
    RolloutConfig,
)
from rloop_mcore.weights.bridge import HfBridge, _named_parameters  # noqa: E402
from rloop_mcore.weights.gather import scattered  # noqa: E402
from tests.layouts import leave_layout  # noqa: E402

# Adam makes of the rounding noise in a small gradient a step in proportion to lr
LEARNING = OptimizerConfig(lr=1e-4, clip_grad=0.5, warmup_updates=2)


def whole_gradients(actor: MegatronActor) -> dict[str, torch.Tensor]:
    """By HF name, after an update: the distributed optimizer leaves each rank its part of the sums."""
    if actor._config.actor.distributed_optimizer:
        for wrapped in actor._wrapped:
            for buffer in (*wrapped.buffers, *wrapped.expert_parallel_buffers):
                group = buffer.data_parallel_group
                for bucket in buffer.buckets:
                    mine = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                    dist.all_gather_into_tensor(bucket.grad_data, mine, group=group)
    return whole(actor, lambda parameter: parameter.main_grad)


def whole(actor: MegatronActor, of: Any = lambda parameter: parameter) -> dict[str, torch.Tensor]:
    """By HF name; of a tied embedding's gradient the first stage's, to which Megatron has added the last one's."""
    tensors = {name: of(parameter) for name, parameter in _named_parameters(actor._chunks).items()}
    return {name: tensor.gather().clone() for name, tensor in scattered(actor._bridge._exported, tensors)}


def train(job: dict[str, Any], out: Path) -> dict[str, Any]:
    config = Config(
        layout=LayoutConfig(**job["layout"]),
        precision="fp32",
        actor=ActorConfig(**({"micro_batch_tokens": 40} | job["actor"])),
        algorithm=AlgorithmConfig(clip_low=CLIP_LOW, clip_high=CLIP_HIGH, dual_clip=DUAL_CLIP),
        rollout=RolloutConfig(temperature=TEMPERATURE),
        cluster=ClusterConfig(collective_timeout_s=60.0),
    )
    folder = Path(job["folder"])
    actor = MegatronActor(config, HfBridge(folder))
    actor.announce = lambda *_: None  # type: ignore[method-assign]  # every rank makes each call itself
    batches = [experiences(seed) for seed in range(3)]
    result: dict[str, Any] = {}

    actor.begin(folder, OptimizerConfig(lr=0.0, weight_decay=0.0, clip_grad=0.0), 1)
    result["logprobs"] = actor.logprobs([row.trajectory for row in batches[0]], False)
    result["metrics"] = actor.update(batches[0])
    result["gradients"] = whole_gradients(actor)

    actor.begin(folder, LEARNING, 3)
    for batch in batches[:2]:
        actor.update(batch)
    actor.start_save(out / f"{job['name']}.checkpoint")
    actor.finish_save()
    actor.update(batches[2])
    result["weights"] = whole(actor)

    for source in (job["name"], *job.get("resume", ())):
        actor.begin(folder, LEARNING, 3)
        actor.load(out / f"{source}.checkpoint")
        actor.update(batches[2])
        result[f"resumed {source}"] = whole(actor)
    return result


def main() -> None:
    jobs, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    for job in jobs:
        result = train(job, out)
        if dist.get_rank() == 0:
            torch.save(result, out / f"{job['name']}.pt")
        leave_layout()
    parallel.destroy()


if __name__ == "__main__":
    main()
