"""The engines a configuration asks for: adopted where they run already, else started here."""

from __future__ import annotations

import ipaddress
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import torch

from rloop_mcore import platform
from rloop_mcore.config import Config
from rloop_mcore.errors import UserError
from rloop_mcore.platform.process_group import address_towards
from rloop_mcore.rollout.launch import EmbeddedServer, RunningServer, SGLangServer, running_servers
from rloop_mcore.weights.channel import BroadcastChannel

_SHARED_BUCKETS = 3  # in /dev/shm: two, and room for others


def weight_channel(config: Config, largest: int) -> BroadcastChannel | None:
    """How weights get to the engines: None, from the trainer's memory, where the run starts them beside the trainer.

    On a GPU of its own an engine gets them by NCCL, which refuses two ranks on one GPU. Where /dev/shm is too small for
    the buckets, and for servers that others started on a machine without a GPU: by gloo. largest: elements of the
    largest tensor.
    """
    rollout = config.rollout
    beside = rollout.engine == "embedded" or not (rollout.endpoints or rollout.gpus)
    backend = "gloo" if beside else platform.backend()
    needed = _SHARED_BUCKETS * max(rollout.bucket_mib * 2**20, largest * torch.float32.itemsize)
    if beside and (platform.device().type == "cuda" or shutil.disk_usage("/dev/shm").free >= needed):
        return None
    return BroadcastChannel(backend, "weights", rollout.start_timeout_s, meeting_address(config))


def meeting_address(config: Config) -> str:
    """Where the engines meet the trainer for the weight broadcast: on loopback, or where `rollout.endpoints` reach it.

    Raises UserError for an endpoint on a host that is unknown or that no route leads to.
    """
    for endpoint in config.rollout.endpoints:
        host = urlsplit(endpoint).hostname or ""
        try:
            address = address_towards(host)
        except OSError as error:
            raise UserError(f"rollout.endpoints: {host} cannot be reached ({error}).") from error
        if not ipaddress.ip_address(address).is_loopback:
            return address
    return "127.0.0.1"


def start_servers(
    config: Config, model: Path, log_folder: Path
) -> Sequence[EmbeddedServer | SGLangServer | RunningServer]:
    """The servers of `rollout.endpoints`, or `rollout.engines` of this run with `model`, still starting."""
    if config.rollout.endpoints:
        return running_servers(config.rollout.endpoints)
    engines = config.rollout.engines
    threads = config.cluster.threads or max(1, len(os.sched_getaffinity(0)) // engines)
    dtype = "float32" if config.precision == "fp32" else "bfloat16"
    device = platform.choose(config.cluster.device)
    if config.rollout.sleep and config.rollout.engine == "sglang" and device == "cpu":
        raise UserError("rollout.sleep=true: SGLang can do that on a GPU only; set rollout.sleep=false here.")

    def start(number: int) -> EmbeddedServer | SGLangServer:
        name = f"engine-{number}" if engines > 1 else "engine"
        most = config.rollout.max_running
        if config.rollout.engine == "embedded":
            return EmbeddedServer(
                model, log_folder, name, max_running=most, threads=threads, dtype=dtype, device=device
            )
        return SGLangServer(
            model,
            log_folder,
            name,
            python=Path(str(config.rollout.python)),
            max_running=most,
            threads=threads,
            dtype=dtype,
            device=device,
            arguments=_sglang_arguments(config, device, number),
            gpus=config.rollout.gpus,
        )

    return [start(number) for number in range(engines)]


def _sglang_arguments(config: Config, device: str, number: int) -> list[str]:
    """The flags of server `number` that its configuration decides."""
    rollout = config.rollout
    arguments = ["--tp-size", str(rollout.tp), "--ep-size", str(rollout.ep)]
    if device == "cuda":
        arguments += ["--base-gpu-id", str(number * rollout.tp)]
    if rollout.sleep and device == "cuda":
        arguments += ["--enable-memory-saver"]
    if rollout.memory_fraction is not None:
        arguments += ["--mem-fraction-static", str(rollout.memory_fraction)]
    return [*arguments, *rollout.server_args]
