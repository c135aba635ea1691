"""What a process has in its environment before torch, NCCL or Transformer Engine look for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

PROGRAM = """
import json, os, sys
from rloop_mcore import platform
platform.setup("cpu", 1)
import torch._inductor.config as inductor
print(json.dumps([os.environ["NCCL_CUMEM_ENABLE"], inductor.compile_threads]))
"""


def settings(**environment: str) -> list[object]:
    """NCCL's way to allocate, and how many processes compile."""
    ours = ("NCCL_CUMEM_ENABLE", "TORCHINDUCTOR_COMPILE_THREADS")
    inherited = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=inherited | environment
    )
    return list(json.loads(done.stdout))


def test_nccl_allocates_as_sglangs_does_and_no_pool_of_compilers_starts() -> None:
    assert settings() == ["0", 1]


def test_the_users_own_settings_stay() -> None:
    assert settings(NCCL_CUMEM_ENABLE="1", TORCHINDUCTOR_COMPILE_THREADS="3") == ["1", 3]
