"""Save while training goes on, load, and fail to save: `worker_checkpoints.py JOBS FOLDER`.

JOBS is a JSON list of {"name", "layout", "precision", "distributed_optimizer", "resume": names of earlier jobs}; FOLDER
holds the dense model of the parity suite in `dense` and gets the checkpoints and NAME.pt, what each job came to. TP2
also fails, and loads what a disk has changed.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

from rloop_mcore import platform

platform.setup("cpu", 1)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync  # noqa: E402
from parity_model import experiences  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import record  # noqa: E402

from rloop_mcore.actor import parallel  # noqa: E402
from rloop_mcore.actor.actor import MegatronActor  # noqa: E402
from rloop_mcore.config import ActorConfig, ClusterConfig, Config, LayoutConfig, OptimizerConfig  # noqa: E402
from rloop_mcore.errors import DiskFull, Fault, UserError  # noqa: E402
from rloop_mcore.platform import manifest  # noqa: E402
from rloop_mcore.platform.manifest import crc32_of  # noqa: E402
from rloop_mcore.weights.bridge import HfBridge  # noqa: E402
from tests.layouts import leave_layout  # noqa: E402

LEARNING = OptimizerConfig(lr=1e-3, clip_grad=0.5, warmup_updates=2)


class Trainer:
    """An actor called on every rank at once."""

    def __init__(self, job: dict[str, Any], folder: Path) -> None:
        config = Config(
            layout=LayoutConfig(**job["layout"]),
            precision=job["precision"],
            actor=ActorConfig(micro_batch_tokens=40, distributed_optimizer=job["distributed_optimizer"]),
            cluster=ClusterConfig(collective_timeout_s=60.0),
        )
        self.folder, self.actor = folder, MegatronActor(config, HfBridge(folder / "dense"))

    def call(self, method: str, *arguments: object) -> Any:
        return getattr(MegatronActor, method).__wrapped__(self.actor, *arguments)

    def update(self, seeds: range) -> None:
        for seed in seeds:
            self.call("update", experiences(seed))

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.gather().clone() for name, tensor in self.actor._bridge.export(self.actor._chunks)}

    def resumed(self, checkpoint: str) -> dict[str, dict[str, torch.Tensor]]:
        self.call("begin", self.folder / "dense", LEARNING, 4)
        self.call("load", self.folder / checkpoint)
        loaded = self.weights()
        self.update(range(2, 4))
        return {"loaded": loaded, "trained": self.weights()}


@contextmanager
def held_writer() -> Iterator[Event]:
    """No byte of a checkpoint is written before the event is set."""
    event, write = Event(), FileSystemWriterAsync.write_preloaded_data

    def waiting(*args: Any, **kwargs: Any) -> Any:
        assert event.wait(60.0)
        return write(*args, **kwargs)

    FileSystemWriterAsync.write_preloaded_data = staticmethod(waiting)
    try:
        yield event
    finally:
        event.set()
        FileSystemWriterAsync.write_preloaded_data = staticmethod(write)


def save_and_train(job: dict[str, Any], trainer: Trainer) -> dict[str, Any]:
    """One that is skipped and two updates; a checkpoint; another one, written only after two more updates are made."""
    name, folder = job["name"], trainer.folder
    trainer.call("begin", folder / "dense", LEARNING, 4)
    trainer.call("update", [replace(row, advantage=float("nan")) for row in experiences(0)])  # Adam does not count it
    trainer.update(range(2))
    saved = trainer.weights()
    trainer.call("start_save", folder / f"{name}.sync")
    trainer.call("finish_save")
    with held_writer() as written:
        trainer.call("start_save", folder / f"{name}.async")
        trainer.update(range(2, 4))
        premature = (folder / f"{name}.async").exists()
        written.set()
        trainer.call("finish_save")
    return {"saved": saved, "trained": trainer.weights(), "premature": premature}


def fail_to_save(trainer: Trainer) -> dict[str, Any]:
    """Rank 1 can't write, then is too slow; then all is well. What each finish said, and what stood in the folder."""
    folder, said = trainer.folder / "failures", []
    with held_writer() as written:
        trainer.call("start_save", folder / "full")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if dist.get_rank() == 1 else soft, hard))
        written.set()
        said.append(failure(trainer))
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with held_writer() as written:
        trainer.call("start_save", folder / "slow")
        if dist.get_rank() == 0:
            written.set()
            assert trainer.actor._pending_save is not None
            trainer.actor._pending_save._written.result(60.0)
        trainer.actor._config.cluster.collective_timeout_s = 2.0
        said.append(failure(trainer))
        trainer.actor._config.cluster.collective_timeout_s = 60.0
    with writer_to_a_full_disk() as kind:
        trainer.call("start_save", folder / "no_space")
        said.append(failure(trainer, kind))
    with bridge_to_a_full_disk(trainer) as kind:
        said.append(failure(trainer, kind, "save_policy", folder / "no_policy"))
    with full_for_rank_0("posix_fallocate") as kind:
        said.append(failure(trainer, kind, "start_save", folder / "no_start"))
    trainer.call("start_save", folder / "no_end")
    with full_for_rank_0("replace") as kind:
        said.append(failure(trainer, kind))
    left = sorted(path.name for path in folder.iterdir())
    dist.barrier()
    trainer.call("start_save", folder / "well")
    trainer.call("finish_save")
    trainer.call("save_policy", folder / "well_too")
    everyone: list[list[str]] = [[], []]
    dist.all_gather_object(everyone, said)
    return {"said": everyone, "left": left, "then": sorted(path.name for path in folder.iterdir())}


def load_what_has_changed(trainer: Trainer, checkpoint: Path) -> list[dict[str, list[str]]]:
    """A bit of each file with tensors changes, one at a time; what every rank said to it, and whether all then load."""
    said: dict[str, list[str]] = {}
    for file in sorted(checkpoint.glob("*.distcp")):
        for part in (0.1, 0.5, 0.9):
            if dist.get_rank() == 0:
                flip(file, part)
            dist.barrier()
            said.setdefault(file.name, []).append(failure(trainer, UserError, "load", checkpoint))
            if dist.get_rank() == 0:
                flip(file, part)
            dist.barrier()
    if dist.get_rank() == 1:
        manifest.crc32_of = failing_disk
    said["unreadable"] = [failure(trainer, Fault, "load", checkpoint)]
    manifest.crc32_of = crc32_of
    said["none"] = [failure(trainer, UserError, "load", checkpoint)]
    everyone: list[dict[str, list[str]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, said)
    return everyone


def failing_disk(file: Path) -> int:
    raise OSError(errno.EIO, "Input/output error")


def flip(file: Path, part: float) -> None:
    content = bytearray(file.read_bytes())
    content[int(len(content) * part)] ^= 1
    file.write_bytes(content)


@contextmanager
def writer_to_a_full_disk() -> Iterator[type[Fault]]:
    """Rank 1's file is one that has no space, ever."""
    write = FileSystemWriterAsync.write_preloaded_data

    def into_nothing(transforms: Any, process: int, bucket: Any, *rest: Any, **kwargs: Any) -> Any:
        return write(transforms, process, ("/dev/full", *bucket[1:]), *rest, **kwargs)

    if dist.get_rank() == 1:
        FileSystemWriterAsync.write_preloaded_data = staticmethod(into_nothing)
    try:
        yield DiskFull
    finally:
        FileSystemWriterAsync.write_preloaded_data = staticmethod(write)


@contextmanager
def bridge_to_a_full_disk(trainer: Trainer) -> Iterator[type[OSError]]:
    """Rank 0, which writes, fails at the third tensor; the others must not wait for it."""
    bridge = trainer.actor._bridge

    def save(tensors: Iterator[Any], path: Path) -> Any:
        for number, _ in enumerate(tensors):
            if number == 2:
                with open("/dev/full", "wb", buffering=0) as file:
                    file.write(b"x")

    bridge.save = save  # type: ignore[method-assign]
    try:
        yield OSError
    finally:
        del bridge.save


@contextmanager
def full_for_rank_0(operation: str) -> Iterator[type[Fault]]:
    """This operation of `os` finds no space on rank 0."""
    real = getattr(os, operation)

    def full(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    if dist.get_rank() == 0:
        setattr(os, operation, full)
    try:
        yield DiskFull
    finally:
        setattr(os, operation, real)


def failure(trainer: Trainer, kind: type[Exception] = Fault, method: str = "finish_save", *arguments: object) -> str:
    try:
        trainer.call(method, *arguments)
    except kind as fault:
        dist.barrier()  # rank 0 has removed what there was
        return str(fault)
    dist.barrier()
    return f"no {kind.__name__}"


@record
def main() -> None:
    jobs, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    for job in jobs:
        trainer = Trainer(job, folder)
        result = save_and_train(job, trainer)
        for source in (f"{job['name']}.sync", f"{job['name']}.async", *job["resume"]):
            result[source] = trainer.resumed(source)
        if job["name"] == "TP2":
            result["changed"] = load_what_has_changed(trainer, folder / "TP2.async")
            result["failures"] = fail_to_save(trainer)
        if dist.get_rank() == 0:
            torch.save(result, folder / f"{job['name']}.pt")
        leave_layout()
    parallel.destroy()


if __name__ == "__main__":
    main()
