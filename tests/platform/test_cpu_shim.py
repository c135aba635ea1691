"""What the CPU shim must leave alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from rloop_mcore import platform

platform.setup("cpu", threads=1)


@pytest.mark.parametrize("factory", ["empty", "zeros", "ones", "full", "arange", "rand", "tensor"])
def test_factories_still_follow_a_device_context(factory: str) -> None:
    """transformers builds models under torch.device("meta"): a factory that ignored it left buffers of garbage."""
    arguments = {"full": ((2,), 1.0), "tensor": ([1.0],)}.get(factory, (2,))
    with torch.device("meta"):
        assert getattr(torch, factory)(*arguments).is_meta


def test_cuda_is_not_pretended() -> None:
    assert not torch.cuda.is_available()
    assert torch.zeros(2, device="cuda").device.type == "cpu"


def test_loggers_that_only_megatrons_timers_want_are_not_loaded() -> None:
    """wandb costs each process of a run a second, and only the first one logs to it."""
    code = "import sys; from rloop_mcore import platform; platform.setup('cpu'); print('wandb' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", f"{code}; import wandb"], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
