"""What the controller costs at 512 and at 4,096 simulated engines, and how evenly it spreads the work.

A step is two groups of 16 an engine, as the paper's 1,024 groups are at 512 engines; engines fail at 1 % an hour. The
engines are simulated on a virtual clock (`simulated_fleet.py` says what is assumed), the controller is the real one.

Overhead: CPU seconds of the simulated run, less those of the same calls made to the simulated clients directly, over
the virtual seconds of its steps, which are of generation only. HTTP and JSON are the client's, and not in it.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from dataclasses import dataclass, field

import numpy as np
from common import arguments, at_most, report
from simulated_fleet import SimulatedFleet, make_requests, run_virtually

from rloop_mcore.types import SampleRequest, Sampling

SAMPLING = Sampling(max_tokens=2048)
GROUPS_PER_ENGINE, GROUP = 2, 16
FAILURES_PER_HOUR = 0.01
STEPS = {512: 4, 4096: 1}  # engines: steps of a run
# Samples at an engine: the default, at which no call waits, and half of a step, at which every other one does.
LIMITS = (256, GROUP)


@dataclass
class Run:
    """Some steps of a fleet: what they cost, and how long they took in virtual time."""

    calls: int = 0
    cpu_s: float = 0.0
    step_s: list[float] = field(default_factory=list)
    busy: list[float] = field(default_factory=list)  # share of the time, an engine
    waits: list[float] = field(default_factory=list)  # until a call was sent to an engine
    lost: int = 0


def _steps(engines: int) -> list[list[list[SampleRequest]]]:
    """The groups of each step."""
    count = engines * GROUPS_PER_ENGINE
    requests = [make_requests(count, GROUP, first=step * count) for step in range(STEPS[engines])]
    return [[flat[i : i + GROUP] for i in range(0, len(flat), GROUP)] for flat in requests]


def _forget() -> None:
    """Keep what is there from the garbage collector: it would look at all requests of a run, again and again."""
    gc.collect()
    gc.freeze()


async def _controlled(engines: int, limit: int) -> Run:
    run, loop = Run(), asyncio.get_running_loop()
    steps = [[request for group in step for request in group] for step in _steps(engines)]
    async with SimulatedFleet(engines, limit=limit, failures_per_hour=FAILURES_PER_HOUR) as fleet:
        _forget()
        began, cpu = loop.time(), time.process_time()
        for requests in steps:
            start, sent = loop.time(), len(fleet.sent)
            await fleet.controller.generate(requests, SAMPLING)
            run.step_s.append(loop.time() - start)
            run.waits += [tries[0][0] - start for tries in list(fleet.sent.values())[sent:]]
        run.cpu_s, run.calls = time.process_time() - cpu, len(fleet.sent)
        run.busy = [server.batch.busy_s / (loop.time() - began) for server in fleet.servers]
        run.lost = fleet.controller.counters.lost
    return run


async def _direct(engines: int) -> float:
    """CPU seconds of the simulated engines alone, given as many calls each."""
    steps = _steps(engines)
    async with SimulatedFleet(engines) as fleet:
        for task in fleet.controller._tasks:  # no probes
            task.cancel()
        clients = [server.client for server in fleet.servers]
        _forget()
        cpu = time.process_time()
        for step, groups in enumerate(steps):
            calls = [(clients[n % engines], group, f"{step}-{n}") for n, group in enumerate(groups)]
            await asyncio.gather(*(client.generate(group, SAMPLING, rid) for client, group, rid in calls if client))
        return time.process_time() - cpu


def _least(engines: int, repeats: int) -> float:
    """The least CPU seconds of a few runs without the controller: noise only adds."""
    return min(run_virtually(_direct(engines)) for _ in range(repeats))


def measure(engines: int, limit: int, direct_s: float, repeats: int) -> tuple[float, float]:
    """(overhead as a share of the step, CPU seconds of the controller a call) of the best run; prints what it saw."""
    runs = [run_virtually(_controlled(engines, limit)) for _ in range(repeats)]
    run = min(runs, key=lambda run: run.cpu_s)  # the runs differ in noise only
    own_s, virtual_s = run.cpu_s - direct_s, sum(run.step_s)
    p50, p99, longest = np.percentile(run.waits, (50, 99, 100))
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
    repeats = 2 if options.quick else 5
    direct = {engines: _least(engines, repeats) for engines in STEPS}
    overheads, ratios = [], []
    for limit in LIMITS:
        few, many = (measure(engines, limit, direct[engines], repeats) for engines in STEPS)
        overheads.append(few[0])
        ratios.append(many[1] / few[1])
    metrics = [
        at_most("controller_overhead_512", max(overheads), 0.02, "virtual step time, the worse of both limits"),
        at_most("controller_linearity_4096", max(ratios), 1.5, "CPU a call at 512, the worse of both limits"),
    ]
    report("controller", metrics, options.json)


if __name__ == "__main__":
    main()
