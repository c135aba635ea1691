"""Run by torchrun for sync.py: rank 0 of a TP2 actor syncs two embedded engines, and broadcasts as many raw bytes.

usage: sync_ranks.py MODEL OUT REPEATS handles|broadcast
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import time
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import PeakMemory

from rloop_mcore import platform
from rloop_mcore.compose import load_config
from rloop_mcore.config import Config
from rloop_mcore.platform.process import die_with_parent
from rloop_mcore.platform.process_group import host_store, join_group, leave_group
from rloop_mcore.protocols import Actor

BUCKET_MIB = 64
ENGINES = 2
TIMEOUT_S = 300.0


def main() -> None:
    die_with_parent(os.getppid())
    model, out, repeats, how = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    platform.setup("cpu", 1)
    from rloop_mcore.actor import parallel
    from rloop_mcore.actor.actor import MegatronActor
    from rloop_mcore.weights.bridge import HfBridge

    settings = ["run.dir=none", f"model.path={model}", "data.train=none", "layout.tp=2", "precision=fp32"]
    config = load_config([*settings, f"rollout.bucket_mib={BUCKET_MIB}"])
    actor = MegatronActor(config, HfBridge(model))
    if dist.get_rank() == 0:
        actor.begin(model, config.optimizer, 1)
        out.write_text(json.dumps(measure(config, actor, out.parent, repeats, how)), encoding="utf-8")
        actor.close()
    else:
        actor.follow()
    parallel.destroy()


def measure(config: Config, actor: Actor, folder: Path, repeats: int, how: str) -> dict[str, float]:
    """Medians of interleaved repeats: seconds of a sync, of its verification, of a raw broadcast; extra bytes held."""
    from rloop_mcore.main.engines import fleet_of
    from rloop_mcore.rollout.launch import EmbeddedServer
    from rloop_mcore.weights.channel import BroadcastChannel

    model = Path(config.model.path)
    servers = [
        EmbeddedServer(model, folder, f"engine-{n}", max_running=1, threads=1, dtype="float32", device="cpu")
        for n in range(ENGINES)
    ]
    channel = BroadcastChannel("gloo", "weights", TIMEOUT_S) if how == "broadcast" else None
    with fleet_of(config, servers, channel, model, deterministic=True) as fleet:
        fleet.wait_ready()
        with PeakMemory() as memory:
            fleet.sync(actor.export, 1)  # joins the group and touches the memory
        found: dict[str, list[float]] = {"sync": [], "verify": [], "raw": []}
        raw = RawBroadcast(int(sum(prod(t.shape) * t.dtype.itemsize for _, t in actor.export())))
        for version in range(2, repeats + 2):
            metrics = fleet.sync(actor.export, version)
            found["sync"].append(metrics["seconds_sync"])
            found["verify"].append(metrics["seconds_verify"])
            found["raw"].append(raw.seconds())
        raw.close()
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    return medians | {"bytes": metrics["sync_bytes"], "extra": float(memory.extra)}


class RawBroadcast:
    """The same bytes from one process to as many others, in buffers of a bucket's size, and nothing else."""

    def __init__(self, size: int) -> None:
        self._counts = [BUCKET_MIB * 2**20] * (size // (BUCKET_MIB * 2**20)) + [size % (BUCKET_MIB * 2**20)]
        self._store = host_store("127.0.0.1", TIMEOUT_S)
        context = multiprocessing.get_context("spawn")
        self._pipes, ends = zip(*(context.Pipe() for _ in range(ENGINES)), strict=True)
        self._processes = [
            context.Process(target=receive, args=(self._store.port, rank + 1, self._counts, ends[rank]), daemon=True)
            for rank in range(ENGINES)
        ]
        for process in self._processes:
            process.start()
        self._group = join_group("gloo", "127.0.0.1", self._store.port, ENGINES + 1, 0, "raw", TIMEOUT_S)
        self._buffer = torch.zeros(BUCKET_MIB * 2**20, dtype=torch.uint8)
        self.seconds()  # touches the memory

    def seconds(self) -> float:
        for pipe in self._pipes:
            pipe.send(True)
        dist.barrier(self._group)
        begun = time.perf_counter()
        for count in self._counts:
            dist.broadcast(self._buffer[:count], group=self._group, group_src=0)
        dist.barrier(self._group)
        return time.perf_counter() - begun

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(False)
        leave_group(self._group)
        for process in self._processes:
            process.join()


def receive(port: int, rank: int, counts: list[int], pipe: Any) -> None:
    """A receiver's process."""
    torch.set_num_threads(1)
    group = join_group("gloo", "127.0.0.1", port, ENGINES + 1, rank, "raw", TIMEOUT_S)
    buffer = torch.zeros(max(counts), dtype=torch.uint8)
    while pipe.recv():
        dist.barrier(group)
        for count in counts:
            dist.broadcast(buffer[:count], group=group, group_src=0)
        dist.barrier(group)
    leave_group(group)


if __name__ == "__main__":
    main()
