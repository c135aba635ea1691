"""What Megatron-Core needs of torch.cuda, answered by the CPU. Only `platform.setup` installs it, where no CUDA is.

`torch.cuda.is_available()` stays False: nothing here claims that there is a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h
_FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange", "rand", "randn", "empty_like", "zeros_like")


class _Stream:
    """A stream on a device that runs everything in order anyway."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: _Stream) -> None:
        pass

    def record_event(self) -> _Stream:
        """An event is done when it is recorded; it has nothing but `synchronize`, which this has too."""
        return self

    def synchronize(self) -> None:
        pass


def install() -> None:
    """Patch torch, then import Megatron-Core and patch the few places that insist on CUDA."""
    if "megatron.core" in sys.modules:
        raise RuntimeError("megatron.core was imported before platform.setup: import the actor after it")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    torch.compile = _uncompiled  # type: ignore[assignment]
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    _keep_freed_memory()
    _patch_cuda_namespace()
    _patch_tensors()
    with warnings.catch_warnings(), _hidden("wandb", "torch.utils.tensorboard"):
        warnings.simplefilter("ignore")  # Megatron says six times over that there is no Transformer Engine or Apex
        _patch_megatron()


@contextlib.contextmanager
def _hidden(*modules: str) -> Iterator[None]:
    """`import` finds none of them: Megatron's timers would spend a second on loggers that nobody hands them."""
    hidden = [name for name in modules if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def _uncompiled(function: Callable[..., Any] | None = None, **_: Any) -> Callable[..., Any]:
    """`torch.compile` that leaves functions alone: Megatron's jit_fuser would cost 17 s on the first step."""
    return function if function is not None else lambda decorated: decorated


def _keep_freed_memory() -> None:
    """Let glibc reuse freed blocks of any size, up to 2 GiB of them; by default a tensor above 32 MiB is mapped anew.

    Touching the fresh pages of a 58 MB activation costs ten times what reusing them does.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_ARENA_MAX, 1)  # the arena of autograd's thread would be unmapped whenever it is empty


def _patch_cuda_namespace() -> None:
    stream = _Stream()
    replacements: dict[str, Any] = {  # each its own function: dynamo refuses one object under two names
        "current_device": lambda: _CPU,
        "set_device": lambda device: None,
        "synchronize": lambda *args, **kwargs: None,
        "Stream": _Stream,
        "current_stream": lambda *args: stream,
        "default_stream": lambda *args: stream,
        "stream": lambda *args: contextlib.nullcontext(),
        "manual_seed": lambda seed: torch.manual_seed(seed),
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)


def _patch_tensors() -> None:
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment, method-assign]
    torch.Tensor.pin_memory = lambda self, *args: self  # type: ignore[assignment, method-assign]
    _device_constructors()  # remembers the real factories: `with torch.device("meta")` would not know ours
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapped


def _patch_megatron() -> None:
    from megatron.core import parallel_state
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.models.gpt import gpt_layer_specs  # noqa: F401  only for its warnings to fall here
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
    from megatron.core.tensor_parallel import mappings, random
    from megatron.core.transformer import mlp
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    from rloop_mcore.platform import cpu_kernels

    _share_groups(parallel_state)
    rope_utils._apply_rotary_pos_emb_thd = cpu_kernels.packed_rope
    mlp.bias_swiglu_impl = cpu_kernels.swiglu
    mlp.weighted_bias_swiglu_impl = cpu_kernels.weighted_swiglu

    class CpuRngTracker(random.CudaRNGStatesTracker):
        """The states of named random streams, drawn from the CPU generator."""

        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    random.CudaRNGStatesTracker = CpuRngTracker
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()

    for cls in (distrib_optimizer.DistributedOptimizer, optimizer.Float16OptimizerWithFloat16Params):
        cls.__init__ = _with_cuda_type_names(cls.__init__)
    clip = _with_cuda_type_names(clip_grads.clip_grad_by_total_norm_fp32)
    clip_grads.clip_grad_by_total_norm_fp32 = optimizer.clip_grad_by_total_norm_fp32 = clip

    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(param_and_grad_buffer, name, _unless_alone(getattr(param_and_grad_buffer, name)))

    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16.1 reads it without Transformer Engine too
        moe_utils.te_general_gemm = None
    move = token_dispatcher.maybe_move_tensor_to_cpu

    def move_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        """Honour `as_numpy` for tensors that are on the CPU already: c10d refuses tensors as split sizes."""
        tensor = move(tensor, as_numpy, record_stream)
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = move_to_cpu
    mappings._gather_along_first_dim = _gather_unequal(mappings._gather_along_first_dim)
    mappings._reduce_scatter_along_first_dim = _scatter_unequal(mappings._reduce_scatter_along_first_dim)


def _share_groups(parallel_state: Any) -> None:
    """Make one group of the same ranks, where Megatron makes one for each thing it does: 24 in a single process.

    A thread of each wakes a hundred times a second, which takes 4 % of a core from a process that waits.
    """
    create, initialize = parallel_state.create_group, parallel_state.initialize_model_parallel
    made: dict[tuple[int, ...], Any] = {}

    def create_group(ranks: list[int], *args: Any, **kwargs: Any) -> Any:
        if tuple(ranks) not in made:
            made[tuple(ranks)] = create(ranks, *args, **kwargs)
        return made[tuple(ranks)]

    def initialize_model_parallel(*args: Any, **kwargs: Any) -> None:
        try:
            initialize(*args, **kwargs)
        finally:
            made.clear()  # a group held here would keep its threads

    parallel_state.create_group = create_group
    parallel_state.initialize_model_parallel = initialize_model_parallel


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron gathers and scatters its buffers in place: nothing to do for one rank, but gloo copies all of it."""

    @functools.wraps(collective)
    def wrapped(output: torch.Tensor, input: torch.Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        if group is not None and group.size() == 1:
            assert output.data_ptr() == input.data_ptr()
            return None
        return collective(output, input, *args, group=group, **kwargs)

    return wrapped


def _gather_unequal(gather: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """NCCL gathers parts of unequal lengths (tokens, over the ranks of an expert's matrices), gloo padded ones."""

    def wrapped(part: torch.Tensor, group: Any, sizes: list[int] | None = None, *args: Any) -> torch.Tensor:
        if sizes is None or len(sizes) == 1:
            return gather(part, group, sizes, *args)
        whole = gather(_padded(part, max(sizes)), group)
        return torch.cat([rows[:size] for rows, size in zip(whole.chunk(len(sizes)), sizes, strict=True)])

    return wrapped


def _scatter_unequal(scatter: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """As `_gather_unequal`, the other way."""

    def wrapped(whole: torch.Tensor, group: Any, sizes: list[int] | None = None, *args: Any) -> torch.Tensor:
        if sizes is None or len(sizes) == 1:
            return scatter(whole, group, sizes, *args)
        padded = torch.cat([_padded(part, max(sizes)) for part in whole.split(sizes)])
        return scatter(padded, group)[: sizes[group.rank()]]

    return wrapped


def _padded(part: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.cat([part, part.new_zeros(rows - len(part), *part.shape[1:])])


def _with_cuda_type_names(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let `Tensor.type()` name the CUDA type while `function` runs: three places of Megatron's optimizer compare it."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        original = torch.Tensor.type

        def type_name(self: torch.Tensor, *type_args: Any, **type_kwargs: Any) -> Any:
            answer = original(self, *type_args, **type_kwargs)
            return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

        torch.Tensor.type = type_name  # type: ignore[assignment, method-assign]
        try:
            return function(*args, **kwargs)
        finally:
            torch.Tensor.type = original  # type: ignore[method-assign]

    return wrapped
