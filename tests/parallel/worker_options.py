"""What the parity suite leaves out, at several layouts of one number of ranks: `worker_options.py JOBS OUT`.

JOBS is a JSON list of {"name", "task", "folder", "layout", "actor", "algorithm"}; OUT/NAME.pt gets what
each came to.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rloop_mcore import platform

platform.setup("cpu", 1)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from options import ADAM, MAX_TOKENS, examples, off_policy  # noqa: E402
from parity_model import TEMPERATURE, experiences  # noqa: E402
from worker_parity import whole, whole_gradients  # noqa: E402

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
from rloop_mcore.weights.bridge import HfBridge  # noqa: E402
from tests.layouts import leave_layout  # noqa: E402

FROZEN = OptimizerConfig(lr=0.0, weight_decay=0.0, clip_grad=0.0)
LEARNING = OptimizerConfig(lr=1e-2, clip_grad=0.5)
DECAYING = OptimizerConfig(**ADAM, schedule="cosine")


def update(actor: MegatronActor, folder: Path) -> dict[str, Any]:
    """One policy update: metrics and every gradient."""
    actor.begin(folder, FROZEN, 1)
    metrics = actor.update(off_policy())
    return {"metrics": metrics, "gradients": whole_gradients(actor)}


def fine_tune(actor: MegatronActor, folder: Path) -> dict[str, Any]:
    """One SFT update with either loss."""
    result = {}
    for loss in ("token_mean", "reward_weighted"):
        actor.begin(folder, FROZEN, 1)
        metrics = actor.fine_tune(examples(), loss)
        result[loss] = {"metrics": metrics, "gradients": whole_gradients(actor)}
    return result


def decay(actor: MegatronActor, folder: Path) -> dict[str, Any]:
    """Three updates of weights that decay fast."""
    actor.begin(folder, DECAYING, 3)
    updates = [actor.update(experiences(seed)) for seed in range(3)]
    norms, rates = ([metrics[name] for metrics in updates] for name in ("grad_norm", "lr"))
    return {"weights": whole(actor), "norms": norms, "rates": rates}


def phases(actor: MegatronActor, folder: Path) -> dict[str, Any]:
    """A phase, the same one again, and what the reference policy says at the end; then a loss that is not finite."""
    result: dict[str, Any] = {}
    trajectories = [row.trajectory for row in off_policy()]
    for phase in ("first", "second"):
        actor.begin(folder, LEARNING, 3)
        result[f"{phase} start"] = actor.logprobs(trajectories, False)
        for seed in range(3):
            actor.update([replace(row, reference_logprobs=row.old_logprobs) for row in experiences(seed)])
        result[phase] = whole(actor)
    result["reference"] = actor.logprobs(trajectories, True)
    result["policy"] = actor.logprobs(trajectories, False)
    broken = [replace(row, advantage=float("nan")) for row in off_policy()]
    result["not finite"] = actor.update(broken)
    result["after"] = whole(actor)
    result["sound"] = actor.update(off_policy())
    return result


def gate(actor: MegatronActor, folder: Path) -> dict[str, Any]:
    """Two updates, and the same with one between them whose gradient norm is over `skip_grad`."""
    large = [replace(row, advantage=100 * row.advantage) for row in experiences(1)]
    actor.begin(folder, LEARNING, 3)
    norms = [actor.update(experiences(seed))["grad_norm"] for seed in (0, 2)]
    plain = whole(actor)
    actor.begin(folder, replace(LEARNING, skip_grad=2 * max(norms)), 3)
    actor.update(experiences(0))
    before = whole(actor)
    metrics = actor.update(large)
    after = whole(actor)
    sound = actor.update(experiences(2))
    mine = [(m["grad_norm"], m["skipped"]) for m in (metrics, sound)]
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    weights = {"plain": plain, "before": before, "after": after, "gated": whole(actor)}
    return weights | {"gate": 2 * max(norms), "ranks": ranks}


def replay(actor: MegatronActor, folder: Path) -> dict[str, Any]:
    """Choices of experts are recorded; then every router is turned round and some trajectories are trained on."""
    batch, held = experiences(0), []

    def note(router: TopKRouter, *_: Any) -> None:
        held.append(len(router.router_replay.replay_backward_list))

    actor.begin(folder, FROZEN, 1)
    recorded = actor.logprobs([row.trajectory for row in batch], False)
    kept = sum(experts.nbytes for experts in actor._routing._kept.values())
    with torch.no_grad():
        for module in (m for chunk in actor._chunks for m in chunk.modules()):
            if isinstance(module, TopKRouter):
                module.weight.neg_()
                module.register_forward_hook(note)
    actor.update(batch[-2::-1])
    gradients = whole_gradients(actor)
    result = {"recorded": recorded, "gradients": gradients, "held": max(held, default=0), "kept": kept}
    return result | {"free": actor.logprobs([row.trajectory for row in batch], False)}


TASKS = {task.__name__: task for task in (update, fine_tune, decay, phases, gate, replay)}


def main() -> None:
    jobs, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    for job in jobs:
        config = Config(
            layout=LayoutConfig(**job["layout"]),
            precision="fp32",
            actor=ActorConfig(**({"micro_batch_tokens": 40} | job["actor"])),
            algorithm=AlgorithmConfig(**job["algorithm"]),
            rollout=RolloutConfig(temperature=TEMPERATURE, max_tokens=MAX_TOKENS),
            cluster=ClusterConfig(collective_timeout_s=60.0),
        )
        folder = Path(job["folder"])
        actor = MegatronActor(config, HfBridge(folder))
        actor.announce = lambda *_: None  # type: ignore[method-assign]  # every rank makes each call itself
        result = TASKS[job["task"]](actor, folder)
        if dist.get_rank() == 0:
            torch.save(result, out / f"{job['name']}.pt")
        leave_layout()
    parallel.destroy()


if __name__ == "__main__":
    main()
