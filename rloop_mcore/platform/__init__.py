"""The one place that knows CUDA+NCCL from CPU+gloo. `setup` comes before any import of megatron.core.

torch is imported where it is used: `rloop status`, the reward workers and, without a GPU, the supervisor of a run
need files and processes, not torch.
"""

from __future__ import annotations

import ctypes
import logging
import os
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING

from rloop_mcore.errors import UserError

if TYPE_CHECKING:
    import torch

# of the policy's logits, in fp32 (actor/logprobs.py)
CHUNK_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 28}  # computed at once: enough to keep the GEMM busy
KEPT_LOGITS = 1 << 24  # at most so many are one chunk, and kept for the backward pass: 64 MiB

_device: torch.device | None = None


def setup(device: str = "auto", threads: int = 0) -> torch.device:
    """Choose this process's device and ready torch and Megatron-Core for it; a second call changes nothing.

    `device`: auto, cpu or cuda. `threads`: CPU threads of this process; 0 is the cores over the processes that
    torchrun started here. Raises UserError where cuda is asked for and there is none.
    """
    global _device
    if _device is not None:
        return _device
    import torch

    # What torch and Megatron warn of concerns each other's interfaces: nothing that a user of ours could change.
    warnings.filterwarnings("ignore", module=r"megatron\.|torch\.distributed")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))  # torchrun says 1
    # With one queue the kernels start in the order of their launch: Megatron's overlap with communication counts on it.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # SGLang sets this one: an NCCL that allocates otherwise cannot open the buffers of an engine on the same node.
    os.environ.setdefault("NCCL_CUMEM_ENABLE", "0")
    # A handful of small kernels: not worth up to 32 compiling processes a rank.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if choose(device) == "cuda":
        _device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(_device)
    else:
        _device = torch.device("cpu")
        from rloop_mcore.platform import cpu_shim

        cpu_shim.install()
    return _device


def choose(device: str) -> str:
    """cpu or cuda, for `cluster.device` auto, cpu or cuda. Raises UserError if cuda is wanted and missing."""
    found = device != "cpu" and _sees_cuda()
    if device == "cuda" and not found:
        raise UserError("cluster.device is 'cuda' and torch sees no CUDA device here; use 'cpu' or 'auto'.")
    return "cuda" if found else "cpu"


def _sees_cuda() -> bool:
    """Whether torch sees a CUDA device. Without NVIDIA's driver it can't, and needn't be imported to say so."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    import torch

    return torch.cuda.is_available()


def check_gpus(processes: int, precision: str) -> None:
    """What a CUDA machine lacks for so many processes at this precision. Raises UserError."""
    import torch

    if find_spec("transformer_engine") is None:
        raise UserError("here is a CUDA device and no Transformer Engine: see docs/gpu.md, or set cluster.device=cpu.")
    gpus = torch.cuda.device_count()
    if processes > gpus:
        raise UserError(f"layout.* asks for {processes} processes and this machine has {gpus} GPUs.")
    needed = {"fp8_delayed": (8, 9), "fp8_tensorwise": (8, 9), "fp8_blockwise": (9, 0), "mxfp8": (10, 0)}.get(precision)
    if needed is not None and torch.cuda.get_device_capability() < needed:
        raise UserError(
            f"precision={precision} needs a GPU of compute capability {needed[0]}.{needed[1]}; this one has "
            f"{'.'.join(map(str, torch.cuda.get_device_capability()))}."
        )


def device() -> torch.device:
    """The device that `setup` chose."""
    if _device is None:
        raise RuntimeError("platform.setup has not been called in this process")
    return _device


def device_name() -> str:
    """What `device` is, for people: the GPU's name, or the CPU's kind."""
    if device().type == "cuda":
        import torch

        return torch.cuda.get_device_name()
    import platform as machine

    return f"CPU ({machine.machine()})"


def backend(kind: str | None = None) -> str:
    """The torch.distributed backend of collectives, nccl or gloo, on a device: cpu or cuda, else that of `setup`."""
    return "nccl" if (kind or device().type) == "cuda" else "gloo"


def deterministic(setting: bool | None, device: str) -> bool:
    """`run.deterministic` on `device`, cpu or cuda: null means on if there is no GPU."""
    return device == "cpu" if setting is None else setting


def make_deterministic() -> None:
    """Have the device's kernels give the same bits each time. The CPU's do as they are."""
    if device().type == "cuda":
        import torch

        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
        os.environ["NCCL_ALGO"] = "Ring"
        torch.use_deterministic_algorithms(True)
