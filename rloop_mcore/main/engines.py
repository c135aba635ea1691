"""The engines a configuration asks for: adopted where they run already, else started here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rloop_mcore import platform
from rloop_mcore.config import Config
from rloop_mcore.rollout.launch import EmbeddedServer, RunningServer, running_servers


def weight_backend(config: Config) -> str:
    """Of the weight broadcast: the embedded engine shares a GPU with rank 0, and NCCL refuses two ranks on one."""
    return "gloo" if config.rollout.engine == "embedded" else platform.backend()


def start_servers(config: Config, model: Path, log_folder: Path) -> Sequence[EmbeddedServer | RunningServer]:
    """The servers of `rollout.endpoints`, or one embedded engine with `model`, still starting."""
    if config.rollout.endpoints:
        return running_servers(config.rollout.endpoints)
    return [
        EmbeddedServer(
            model,
            log_folder,
            "engine",
            max_running=config.rollout.max_running,
            threads=config.cluster.threads or len(os.sched_getaffinity(0)),
            dtype="float32" if config.precision == "fp32" else "bfloat16",
            device=platform.choose(config.cluster.device),
        )
    ]
