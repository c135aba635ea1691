"""Train the toy policy at one layout and write what came out: `worker_layouts.py TP PP DP OUT [CHECKPOINT...]`."""

from __future__ import annotations

import sys
from pathlib import Path

from rloop_mcore import platform

platform.setup("cpu", 1)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from toy_data import advantages, examples, trajectories  # noqa: E402
from toy_policy import ToyBridge, gather_full, global_names  # noqa: E402

from rloop_mcore.actor import parallel  # noqa: E402
from rloop_mcore.actor.actor import MegatronActor  # noqa: E402
from rloop_mcore.config import (  # noqa: E402
    ActorConfig,
    ClusterConfig,
    Config,
    LayoutConfig,
    OptimizerConfig,
    RolloutConfig,
)

ROWS = 7  # an odd number: data-parallel ranks and micro-batches get unequal shares
RL = OptimizerConfig(lr=1e-2, clip_grad=1.0, warmup_updates=2)
SFT = OptimizerConfig(lr=1e-2, schedule="cosine", clip_grad=0.0)


def gradients(actor: MegatronActor) -> dict[str, torch.Tensor]:
    """Collective: the whole gradients of the last update, from the distributed optimizer's shards."""
    mine = {}
    for part in actor._optimizer.megatron.chained_optimizers:
        for name, parameter in global_names(actor._chunks[0]).items():
            flat = torch.zeros(parameter.numel())
            if parameter in part.model_param_group_index_map:
                group, order = part.model_param_group_index_map[parameter]
                shard = part._get_model_param_range_map(parameter)["param"]
                flat[shard.start : shard.end] = part.optimizer.param_groups[group]["params"][order].grad
            mine[name] = flat.view_as(parameter)
    return gather_full(mine, sum_over_dp=True)


def weights(actor: MegatronActor) -> dict[str, torch.Tensor]:
    return gather_full(global_names(actor._chunks[0]))


def run(method: str, actor: MegatronActor, *arguments: object) -> object:
    """Call a collective method on every rank at once: the tests of `conduct` are elsewhere."""
    return getattr(MegatronActor, method).__wrapped__(actor, *arguments)


def main() -> None:
    tp, pp, dp = (int(argument) for argument in sys.argv[1:4])
    out, resume = Path(sys.argv[4]), [Path(argument) for argument in sys.argv[5:]]
    config = Config(
        layout=LayoutConfig(tp=tp, pp=pp, dp=dp),
        precision="fp32",
        actor=ActorConfig(micro_batch_tokens=1 << 20),
        rollout=RolloutConfig(temperature=0.8),
        cluster=ClusterConfig(collective_timeout_s=60.0),
    )
    actor = MegatronActor(config, ToyBridge())
    batches = [trajectories(ROWS, seed) for seed in range(3)]
    result: dict[str, object] = {}

    for name, tokens in (("one", 1 << 20), ("many", 30)):
        config.actor.micro_batch_tokens = tokens
        run("begin", actor, Path("1"), SFT, 3)
        metrics = run("fine_tune", actor, examples(ROWS, 0))
        result[f"sft_{name}"] = (metrics, gradients(actor))
        run("begin", actor, Path("1"), OptimizerConfig(lr=1e-2, clip_grad=0.0), 3)
        metrics = run("update", actor, batches[0], advantages(ROWS))
        result[f"rl_{name}"] = (metrics, gradients(actor))

    run("begin", actor, Path("1"), RL, 3)
    history = [run("update", actor, batch, advantages(ROWS)) for batch in batches[:2]]
    run("save", actor, out.with_suffix(".checkpoint"))
    history.append(run("update", actor, batches[2], advantages(ROWS)))
    result["history"], result["trained"] = history, weights(actor)

    run("begin", actor, Path("2"), RL, 3)
    run("update", actor, batches[1], advantages(ROWS))
    run("load", actor, out.with_suffix(".checkpoint"))
    run("update", actor, batches[2], advantages(ROWS))
    result["resumed"] = weights(actor)

    for checkpoint in resume:
        run("begin", actor, Path("2"), RL, 3)
        run("load", actor, checkpoint)
        run("update", actor, batches[2], advantages(ROWS))
        result[f"resumed_{checkpoint.stem}"] = weights(actor)

    run("begin", actor, Path("1"), RL, 3)
    for batch in batches:
        run("update", actor, batch, advantages(ROWS))
    result["trained_again"] = weights(actor)

    run("begin", actor, Path("1"), RL, 3)
    result["before"] = weights(actor)
    result["skipped"] = run("update", actor, batches[0], [float("nan")] * ROWS)
    result["after_skip"] = weights(actor)
    if dist.get_rank() == 0:
        torch.save(result, out)
    parallel.destroy()


if __name__ == "__main__":
    main()
