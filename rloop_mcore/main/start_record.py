"""What the journal says of every start of a run: after what, where, and with which software."""

from __future__ import annotations

import os
import platform as machine
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rloop_mcore.main.run_directory import RunDirectory

_PACKAGES = ("rloop-mcore", "torch", "megatron-core", "transformers", "transformer-engine", "sglang", "pyarrow")


def start_record(run: RunDirectory, device: str) -> dict[str, Any]:
    """The fields of the event "started". `device` is the kind and name of what the policy trains on.

    `previous` is how the process before ended ({"code", "message"}), or null where it left no word, or was none.
    """
    return {
        "previous": run.previous_ending(),
        "host": machine.node(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0")),  # how often Slurm has requeued the job
        "environment": {
            "python": machine.python_version(),
            "system": machine.platform(),
            "cores": len(os.sched_getaffinity(0)),
            "device": device,
            "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
