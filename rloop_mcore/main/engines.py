"""The engines a configuration asks for: adopted where they run already, else started here."""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from rloop_mcore import platform
from rloop_mcore.config import Config
from rloop_mcore.errors import UserError
from rloop_mcore.hf_config import read_hf_config
from rloop_mcore.main.job_folder import JobFolder
from rloop_mcore.planning.nodes import roles
from rloop_mcore.platform.network import address_towards
from rloop_mcore.platform.process import allow_many_files
from rloop_mcore.rollout.controller import Server
from rloop_mcore.rollout.embedded import KEY_VARIABLE
from rloop_mcore.rollout.launch import EmbeddedServer, RunningServer, SGLangServer
from rloop_mcore.rollout.published import Publication, PublishedServer
from rloop_mcore.rollout.router import engines_of

if TYPE_CHECKING:
    from rloop_mcore.rollout.fleet import Fleet
    from rloop_mcore.weights.channel import BroadcastChannel

_ESCAPED = frozenset("\"'\\<>&")
_FP32_BYTES = 4
_SHARED_BUCKETS = 3  # in /dev/shm: two, and room for others


def weight_channel(config: Config, largest: int) -> BroadcastChannel | None:
    """How weights get to the engines: None, from the trainer's memory, where the run starts them beside the trainer.

    On a GPU of its own an engine gets them by NCCL, which refuses two ranks on one GPU. Where /dev/shm is too small for
    the buckets, and for servers that others started on a machine without a GPU: by gloo. largest: elements of the
    largest tensor.
    """
    rollout = config.rollout
    apart = bool(rollout.endpoints or rollout.nodes)
    elsewhere = apart or bool(roles(config).hosts)
    beside = not apart and (rollout.engine == "embedded" or not rollout.gpus)
    backend = "gloo" if beside else platform.backend()
    needed = _SHARED_BUCKETS * max(rollout.bucket_mib * 2**20, largest * _FP32_BYTES)
    if not elsewhere and beside and (platform.device().type == "cuda" or shutil.disk_usage("/dev/shm").free >= needed):
        return None
    from rloop_mcore.weights.channel import BroadcastChannel  # torch, which the keeper of the engines does without

    return BroadcastChannel(backend, "weights", rollout.start_timeout_s, meeting_address(config))


def fleet_of(
    config: Config, servers: Sequence[Server], channel: BroadcastChannel | None, model: Path, deterministic: bool
) -> Fleet:
    """The engines behind `servers`, which start with the folder `model` and get weights by `channel`."""
    from rloop_mcore.rollout.fleet import Fleet  # torch: while the servers import theirs
    from rloop_mcore.rollout.served import ServedModel

    rollout = config.rollout
    return Fleet(
        servers,
        channel,
        model=ServedModel.of(read_hf_config(model), model, fp8=rollout.quantization == "fp8"),
        bucket_mib=rollout.bucket_mib,
        start_timeout_s=rollout.start_timeout_s,
        request_timeout_s=rollout.request_timeout_s,
        backend=channel.backend if channel is not None else "gloo",
        deterministic=deterministic,
        max_running=rollout.max_running,
        partial=rollout.partial,
    )


def meeting_address(config: Config) -> str:
    """Where the engines meet the trainer for the weight broadcast: on loopback, where `rollout.endpoints` reach it, or
    where the other nodes of the job do.

    Raises UserError for an endpoint on a host that is unknown or that no route leads to.
    """
    job = JobFolder.of_this_job()
    if job is not None and roles(config).hosts:
        return job.head().address
    for endpoint in config.rollout.endpoints:
        host = urlsplit(endpoint).hostname or ""
        try:
            address = address_towards(host)
        except OSError as error:
            raise UserError(f"rollout.endpoints: {host} cannot be reached ({error}).") from error
        if not ipaddress.ip_address(address).is_loopback:
            return address
    return "127.0.0.1"


def with_engines_for_routers(config: Config) -> Config:
    """The configuration with a router's workers in its place among `rollout.endpoints`. Raises UserError."""
    if not config.rollout.endpoints:
        return config
    engines = engines_of(config.rollout.endpoints, _key_of_endpoints())
    return replace(config, rollout=replace(config.rollout, endpoints=engines))


def _key_of_endpoints() -> str | None:
    """From the environment, less the newline of a file that it was read from. Raises UserError."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{KEY_VARIABLE} holds a character that cannot be sent: a key is printable ASCII.")
    if set(key) & _ESCAPED:
        raise UserError(
            f"{KEY_VARIABLE} holds one of {' '.join(sorted(_ESCAPED))}, which JSON or HTML write otherwise, so that it "
            "could not be kept out of the logs: start the servers with another key."
        )
    return key or None


def start_servers(config: Config, model: Path, log_folder: Path) -> Sequence[Server]:
    """The servers of `rollout.endpoints`, or those that the nodes of the job keep, or `rollout.engines` of this run
    with `model`, still starting."""
    allow_many_files()  # a call is a socket, and there may be `rollout.max_running` calls an engine
    if config.rollout.endpoints:
        key = _key_of_endpoints()
        return [RunningServer(url, key) for url in config.rollout.endpoints]
    job, engines = JobFolder.of_this_job(), range(config.rollout.engines)
    if job is not None and roles(config).hosts:
        key = job.key()
        return [PublishedServer(Publication(job.folder, number), key) for number in engines]
    return [start_engine(config, model, log_folder, number, engines) for number in engines]


def start_engine(
    config: Config, model: Path, log_folder: Path, number: int, here: range, host: str = "127.0.0.1", key: str = ""
) -> EmbeddedServer | SGLangServer:
    """Start engine `number`, one of those that this node has; does not wait.

    host: the address it listens on; key: what it asks callers for, one of its own where empty.
    """
    threads = config.cluster.threads or max(1, len(os.sched_getaffinity(0)) // len(here))
    dtype = "float32" if config.precision == "fp32" else "bfloat16"
    device = platform.choose(config.cluster.device)
    if config.rollout.sleep and config.rollout.engine == "sglang" and device == "cpu":
        raise UserError("rollout.sleep=true: SGLang can do that on a GPU only; set rollout.sleep=false here.")
    name = f"engine-{number}" if config.rollout.engines > 1 else "engine"
    most = config.rollout.max_running
    if config.rollout.engine == "embedded":
        return EmbeddedServer(
            model,
            log_folder,
            name,
            max_running=most,
            threads=threads,
            dtype=dtype,
            device=device,
            host=host,
            api_key=key,
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
        arguments=_sglang_arguments(config, device, number - here.start),
        gpus=config.rollout.gpus,
        host=host,
        api_key=key,
    )


def _sglang_arguments(config: Config, device: str, number: int) -> list[str]:
    """The flags of server `number` of its node that its configuration decides."""
    rollout = config.rollout
    arguments = ["--tp-size", str(rollout.tp), "--ep-size", str(rollout.ep)]
    if rollout.dp > 1:  # since 0.5.22 also --attn-dp-size; this is what all supported versions know
        arguments += ["--dp-size", str(rollout.dp), "--enable-dp-attention"]
    if rollout.quantization == "fp8":
        # SGLang's own quantisation of a bf16 model keeps no layout that weights can be sent into. So it is told that
        # the model is an FP8 checkpoint, filled with random values: the first sync, before any sample, writes them all.
        from rloop_mcore.rollout.fp8 import QUANTIZATION_CONFIG  # torch, as above

        config_json = json.dumps({"quantization_config": dict(QUANTIZATION_CONFIG)})
        arguments += ["--quantization", "fp8", "--json-model-override-args", config_json, "--load-format", "dummy"]
    if device == "cuda":
        arguments += ["--base-gpu-id", str(number * rollout.tp)]
    if rollout.sleep and device == "cuda":
        arguments += ["--enable-memory-saver"]
    if rollout.memory_fraction is not None:
        arguments += ["--mem-fraction-static", str(rollout.memory_fraction)]
    return [*arguments, *rollout.server_args]
