"""What the controller costs at 512 and at 4,096 simulated engines, and how evenly it spreads the work.

A step is two groups of 16 an engine, as the paper's 1,024 groups are at 512 engines; engines fail at 1 % an hour. The
engines are simulated on a virtual clock (`simulated_fleet.py` says what is assumed), the controller is the real one.

Overhead: CPU seconds of the simulated run, less those of a replay without the controller (the same calls, made to the
same simulated engines at the same virtual times), over the virtual seconds of its steps, which are of generation only.
HTTP and JSON are the client's, and not in it; nor is the garbage collector, which is off: what it costs hangs on all
that lives in the process, here mostly the simulated engines.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import simulated_fleet
from common import arguments, at_most, report
from simulated_fleet import SimulatedFleet, make_requests, run_virtually

from rloop_mcore.rollout.client import EngineClient
from rloop_mcore.types import Completion, SampleRequest, Sampling

# A token here stands for 16 of a response of up to 2,048: the memory that ids take is not what is measured.
SAMPLING, TOKENS_PER_S = Sampling(max_tokens=128), simulated_fleet.TOKENS_PER_S / 16
GROUPS_PER_ENGINE, GROUP = 2, 16
FAILURES_PER_HOUR = 0.01
STEPS = {512: 8, 4096: 1}  # engines: steps of a run
# Samples at an engine: the default, at which no call waits, and half of a step, at which every other one does.
LIMITS = (256, GROUP)


@dataclass
class Run:
    """Some steps of a fleet: what they cost, and how long they took in virtual time."""

    calls: int = 0
    cpu_s: float = 0.0
    step_s: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)  # share of the time, an engine
    schedule: list[list[tuple[float, int]]] = field(default_factory=list)  # a step's calls: sent after s, to engine
    lost: int = 0


def _steps(engines: int) -> list[list[list[SampleRequest]]]:
    """The groups of each step."""
    count = engines * GROUPS_PER_ENGINE
    requests = [make_requests(count, GROUP, first=step * count) for step in range(STEPS[engines])]
    return [[flat[i : i + GROUP] for i in range(0, len(flat), GROUP)] for flat in requests]


async def _controlled(engines: int, limit: int) -> Run:
    run, loop = Run(), asyncio.get_running_loop()
    steps = [[request for group in step for request in group] for step in _steps(engines)]
    async with SimulatedFleet(
        engines, limit=limit, failures_per_hour=FAILURES_PER_HOUR, tokens_per_s=TOKENS_PER_S
    ) as fleet:
        gc.collect()
        began, cpu = loop.time(), time.process_time()
        for requests in steps:
            start, sent = loop.time(), len(fleet.sent)
            await fleet.controller.generate(requests, SAMPLING)
            run.step_s.append(loop.time() - start)
            tries = sorted(list(fleet.sent.items())[sent:], key=lambda call: int(call[0].rpartition("-")[2]))
            run.schedule.append([(first - start, engine) for _, [(first, engine), *_] in tries])
        run.cpu_s, run.calls = time.process_time() - cpu, len(fleet.sent)
        run.busy = [server.batch.busy_s / (loop.time() - began) for server in fleet.servers]
        run.lost = fleet.controller.counters.lost
    return run


async def _replayed(engines: int, schedule: list[list[tuple[float, int]]]) -> float:
    """CPU seconds of the simulated engines alone, given the calls of a run when they were given them."""
    steps = _steps(engines)

    async def call(at_s: float, client: EngineClient, group: list[SampleRequest], rid: str) -> list[Completion]:
        if at_s:
            await asyncio.sleep(at_s)
        return await client.generate(group, SAMPLING, rid)

    async with SimulatedFleet(engines, tokens_per_s=TOKENS_PER_S) as fleet:
        for task in fleet.controller._tasks:  # no probes
            task.cancel()
        clients = [cast(EngineClient, server.client) for server in fleet.servers]
        gc.collect()
        cpu = time.process_time()
        for step, (groups, calls) in enumerate(zip(steps, schedule, strict=True)):
            numbered = enumerate(zip(groups, calls, strict=True))
            await asyncio.gather(*(call(at, clients[e], group, f"{step}-{n}") for n, (group, (at, e)) in numbered))
        return time.process_time() - cpu


def measure(engines: int, limit: int, repeats: int) -> tuple[float, float]:
    """(overhead as a share of the step, CPU seconds of the controller a call), medians; prints what it saw."""
    runs, own = [], []
    for _ in range(repeats + 1):
        runs.append(run_virtually(_controlled(engines, limit)))
        own.append(runs[-1].cpu_s - run_virtually(_replayed(engines, runs[-1].schedule)))
    # The first pair gets the memory that the others find there.
    run, own_s, virtual_s = runs[-1], float(np.median(own[1:])), sum(runs[-1].step_s)
    p50, p99, longest = np.percentile([at for step in run.schedule for at, _ in step], (50, 99, 100))
    print(
        f"{engines} engines, at most {limit} samples each, {len(run.step_s)} steps of {run.calls // len(run.step_s)} "
        f"calls, {run.lost} engines lost\n"
        f"  {own_s / run.calls * 1e6:.0f} us a call, {own_s / virtual_s:.2%} of the step; "
        f"with the simulated engines {run.cpu_s / virtual_s:.2%}\n"
        f"  step: median {np.median(run.step_s):.1f} s, slowest {max(run.step_s):.1f} s\n"
        f"  busy share of an engine: min {min(run.busy):.2f}, mean {np.mean(run.busy):.2f}, max {max(run.busy):.2f}\n"
        f"  wait of a call: p50 {p50:.1f} s, p99 {p99:.1f} s, max {longest:.1f} s",
        flush=True,
    )
    return own_s / virtual_s, own_s / run.calls


def main() -> None:
    options = arguments(__doc__ or "")
    logging.disable(logging.WARNING)  # what is lost and why
    gc.disable()
    repeats = 3 if options.quick else 7
    overheads, ratios = [], []
    for limit in LIMITS:
        few, many = (measure(engines, limit, repeats) for engines in STEPS)
        overheads.append(few[0])
        ratios.append(many[1] / few[1])
    metrics = [
        at_most("controller_overhead_512", max(overheads), 0.02, "virtual step time, the worse of both limits"),
        at_most("controller_linearity_4096", max(ratios), 1.5, "CPU a call at 512, the worse of both limits"),
    ]
    report("controller", metrics, options.json)


if __name__ == "__main__":
    main()
