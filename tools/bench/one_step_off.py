"""One step off against the ideal: a step should take as long as the longer of generation and training.

A real Megatron actor and a real engine process, on a core each, take the same steps synchronously and one step off.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from common import arguments, at_least, random_qwen2, report
from even_rewards import EvenRewards

from rloop_mcore import platform
from rloop_mcore.compose import load_config
from rloop_mcore.protocols import Actor, Rollout
from rloop_mcore.rl_step import RLStep
from rloop_mcore.trajectory.cache import TrajectoryCache
from rloop_mcore.types import Problem, Prompt

TRAINER_CORE, ENGINE_CORE = 0, 1
PROMPT, RESPONSE, GROUP = 48, 64, 8


class EndlessPrompts:
    """Random prompts; the text of a response is its ids."""

    def draw(self, position: int, count: int, weights: Sequence[float] | None = None) -> tuple[list[Prompt], int]:
        return [self._prompt(number) for number in range(position, position + count)], position + count

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))

    def _prompt(self, number: int) -> Prompt:
        ids = torch.randint(1, 4096, (PROMPT,), generator=torch.Generator().manual_seed(number))
        return Prompt(Problem(str(number), "", ""), tuple(ids.tolist()))


def main() -> None:
    options = arguments(__doc__ or "")
    if len(os.sched_getaffinity(0)) < 2:
        print("needs two cores: one for the trainer, one for the engine")
        raise SystemExit(77)
    steps = 4 if options.quick else 8
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        random_qwen2(model, options.quick)
        metrics = [
            at_least("async_vs_ideal", measure(model, steps), 0.85, "max(generation, training) of the same steps")
        ]
    report("one_step_off", metrics, options.json)


def measure(model: Path, steps: int) -> float:
    """Median ideal step over median step one step off."""
    os.sched_setaffinity(0, {ENGINE_CORE})
    from rloop_mcore.rollout.launch import EmbeddedServer

    server = EmbeddedServer(model, model.parent, "engine", max_running=64, threads=1, dtype="float32", device="cpu")
    os.sched_setaffinity(0, {TRAINER_CORE})
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    platform.setup("cpu", 1)
    from rloop_mcore.actor import parallel
    from rloop_mcore.actor.actor import MegatronActor
    from rloop_mcore.main.engines import fleet_of
    from rloop_mcore.weights.bridge import HfBridge
    from rloop_mcore.weights.channel import BroadcastChannel

    settings = ["algorithm.prompts_per_step=8", "algorithm.sampled_per_step=8", "algorithm.updates_per_step=1"]
    settings += [f"algorithm.group_size={GROUP}", "algorithm.dynamic_sampling=false", "algorithm.overlong_buffer=0"]
    settings += [f"rollout.max_tokens={RESPONSE}", "precision=fp32", "optimizer.warmup_updates=0"]
    settings += ["run.dir=none", f"model.path={model}", "data.train=none"]
    config = load_config(settings)
    actor = MegatronActor(config, HfBridge(model))
    actor.begin(model, config.optimizer, 1000)
    channel = BroadcastChannel("gloo", "weights", config.rollout.start_timeout_s)
    with fleet_of(config, [server], channel, model, deterministic=True) as fleet:
        step = RLStep(config, actor, fleet, EvenRewards(), EndlessPrompts(), TrajectoryCache(model.parent / "cache"))
        run(step, actor, fleet, 2)  # the first steps pay for set-up and for the memory
        apart = run(step, actor, fleet, steps)
        config.rollout.max_lag = 1
        beside = run(step, actor, fleet, steps + 1)[1:]  # the first one has nothing to overlap with
    actor.close()
    parallel.destroy()
    generation, training = (statistics.median(row[name] for row in apart) for name in ("generate", "train"))
    together, one_after_another = (statistics.median(row["step"] for row in rows) for rows in (beside, apart))
    print(
        f"generation {generation:.2f} s, training {training:.2f} s; a step: synchronous {one_after_another:.2f} s, "
        f"one step off {together:.2f} s ({one_after_another / together:.2f}x)"
    )
    return max(generation, training) / together


def run(step: RLStep, actor: Actor, fleet: Rollout, steps: int) -> list[dict[str, float]]:
    """Seconds of generation, of training (with the sync), and of the whole of each step."""
    rows = []
    with step.feed(0, 0, steps, 0) as feed:
        for number in range(steps):
            begun = time.perf_counter()
            feed.settle(number)
            settled = time.perf_counter()
            fleet.sync(actor.export, number)
            synced = time.perf_counter()
            batch = feed.take(number)
            taken = time.perf_counter()
            step.train(0, number, batch, number)
            ended = time.perf_counter()
            seconds = {"generate": batch.seconds["seconds_generate"], "step": ended - begun}
            rows.append(seconds | {"train": ended - taken + synced - settled})
    return rows


if __name__ == "__main__":
    main()
