"""What a node finds out about itself, alone: its GPUs, its versions, its disks. Each question has a deadline."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from dataclasses import dataclass, field
from hashlib import blake2b
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

import rloop_mcore
from rloop_mcore import platform
from rloop_mcore.config import GENERATED_MODEL, Config
from rloop_mcore.errors import UserError

_PATIENCE_S = 30.0
_SGLANG = "from importlib.metadata import version; print(version('sglang'))"


@dataclass(frozen=True)
class Gpu:
    index: int
    uuid: str
    name: str
    used_mib: int
    processes: int  # that compute on it: none of them is ours


@dataclass(frozen=True)
class Facts:
    """`free_gib` is by folder; `trouble`: what a check could not find out, and why."""

    host: str
    device: str
    gpus: list[Gpu]
    versions: dict[str, str]
    free_gib: dict[str, float]
    trouble: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, values: dict[str, Any]) -> Facts:
        return cls(**{**values, "gpus": [Gpu(**gpu) for gpu in values["gpus"]]})


def gather(config: Config) -> Facts:
    """The facts of this node."""
    trouble: dict[str, str] = {}
    # asked by NVML: CUDA must not be touched before the processes that use it are forked
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    try:
        device = platform.choose(config.cluster.device)
    except UserError:
        device, trouble["gpus"] = "none", "torch sees no GPU, and cluster.device=cuda"
    gpus: list[Gpu] = []
    driver = "absent"
    if device == "cuda":
        try:
            gpus, driver = query_gpus(), _ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        except OSError as error:
            trouble["gpus"] = str(error)
    free = {}
    for folder in (config.run.dir, "/tmp", "/dev/shm"):
        try:
            free[folder] = round(shutil.disk_usage(folder).free / 2**30, 3)
        except OSError as error:
            trouble["run.dir" if folder == config.run.dir else folder] = f"{folder}: {error.strerror}"
    model = Path(config.model.path) / "config.json"
    if config.model.path not in ("?", GENERATED_MODEL) and not model.is_file():
        trouble["model"] = f"sees no {model}: model.path must be on a file system that all nodes share"
    return Facts(
        host=socket.gethostname(),
        device=device,
        gpus=gpus,
        versions=_versions(config, driver.partition("\n")[0]),
        free_gib=free,
        trouble=trouble,
    )


def query_gpus() -> list[Gpu]:
    """The GPUs that this process may use. Raises OSError where nvidia-smi does not answer."""
    form = "--format=csv,noheader,nounits"
    rows = _ask("nvidia-smi", "--query-gpu=index,uuid,name,memory.used", form).splitlines()
    busy = _ask("nvidia-smi", "--query-compute-apps=gpu_uuid", form).splitlines()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = []
    for row in rows:
        index, uuid, name, used = (cell.strip() for cell in row.split(",", 3))
        if visible is None or {index, uuid} & set(visible.split(",")):
            gpus.append(Gpu(int(index), uuid, name, int(used) if used.isdigit() else 0, busy.count(uuid)))
    return gpus


def _versions(config: Config, driver: str) -> dict[str, str]:
    import torch

    found = {"python": python_version(), "rloop_mcore": _sources(), "torch": str(torch.__version__), "driver": driver}
    found["cuda"] = str(torch.version.cuda)
    if torch.distributed.is_nccl_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    for package in ("megatron-core", "transformer-engine", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    if config.rollout.python is not None:
        try:
            found["sglang"] = _ask(config.rollout.python, "-c", _SGLANG)
        except OSError as error:
            found["sglang"] = f"unknown ({error})"
    return found


def _sources() -> str:
    """A digest of this package's files: two nodes must not run two revisions."""
    folder, digest = Path(rloop_mcore.__file__).parent, blake2b(digest_size=6)
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _ask(*command: str) -> str:
    """What a program prints. Raises OSError, with its name, where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired as error:
        raise OSError(f"{command[0]} did not answer within {_PATIENCE_S:g} s") from error
    except OSError as error:
        raise OSError(f"{command[0]} cannot be run ({error.strerror})") from error
    if done.returncode != 0:
        raise OSError(f"{command[0]} failed: {(done.stderr or done.stdout).strip().rpartition(chr(10))[2]}")
    return done.stdout.strip()
