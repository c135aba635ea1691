"""Weights, optimizer, schedule and RNG as one Megatron checkpoint that any layout can load."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from rloop_mcore.actor.optimizer import PolicyOptimizer, copy_to_offloaded, count_in_parts
from rloop_mcore.errors import Fault, UserError
from rloop_mcore.platform.manifest import check_manifest
from rloop_mcore.platform.precision import scales, set_scales

_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,  # one replica gathers the state, over the CPUs
    "chained_optim_avoid_prefix": True,
}
_MAIN_WEIGHTS = "fp32_from_fp16_params"  # Megatron's name of them in a state


def load(path: Path, chunks: list[DistributedDataParallel], optimizer: PolicyOptimizer) -> None:
    """Collective: restore what was saved at this or another layout, into a model and optimizer already built.

    Raises UserError where the checkpoint is not what was saved.
    """
    _check(path)
    saved = load_sharded_metadata(str(path))
    wanted = state_of(chunks, optimizer, saved)
    # Megatron would quantise a matrix in the parts that it reads, each by a scale of its own, and keep the last scale.
    force_all_tensors_to_non_fp8(wanted)
    state = dist_checkpointing.load(wanted, str(path))
    for i, chunk in enumerate(chunks):
        found = _saved_scales(chunk.module, state[f"model{i}"])
        _restore_scales(found)
        chunk.load_state_dict(state[f"model{i}"])
        _restore_scales(found)  # an FP8 parameter that is given its value notes the greatest one
    optimizer.update, optimizer.steps = state["update"], state["steps"]
    for i, part in _parts(optimizer):
        with ExitStack() as stack:
            if isinstance(part, DistributedOptimizer):
                stack.enter_context(_step_left_alone(part))
            part.load_state_dict(_completed(state["optimizer"][i], part, optimizer.steps))
        for parameter_state in part.optimizer.state.values():
            if "step" in parameter_state:  # Megatron leaves one tensor for all: steps would count double
                parameter_state["step"] = parameter_state["step"].clone()
    copy_to_offloaded(optimizer.megatron)
    count_in_parts(optimizer.megatron)
    torch.set_rng_state(state["rng"])


def _check(path: Path) -> None:
    """Collective: every rank reads its share of the files.

    UserError on all of them where one is not what was saved, Fault where a rank can't read it.
    """
    failures: list[Exception | None] = [None] * dist.get_world_size()
    mine: Exception | None = None
    try:  # those from before there were manifests have none
        check_manifest(path, trust=True, share=(dist.get_rank(), dist.get_world_size()))
    except UserError as error:
        mine = error
    except OSError as error:
        mine = Fault(f"{path} can't be read by rank {dist.get_rank()} ({error})")
    dist.all_gather_object(failures, mine)
    if (failure := next(filter(None, failures), None)) is not None:
        raise failure


def state_of(
    chunks: list[DistributedDataParallel], optimizer: PolicyOptimizer, saved: Container[str] | None = None
) -> dict[str, Any]:
    """What to save; or what to load of a checkpoint that has the keys `saved`."""
    # The policy has no dropout: the only generator is the default one, the same on every rank.
    state: dict[str, Any] = {"update": optimizer.update, "steps": optimizer.steps, "rng": torch.get_rng_state()}
    metadata = dict(_METADATA)  # Megatron adds the process groups of this moment to it
    models = {f"model{i}": chunk.module.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}
    for i, chunk in enumerate(chunks):
        _only_scales(chunk.module, models[f"model{i}"], saved)
    state["optimizer"] = {}
    for i, part in _parts(optimizer):
        with ExitStack() as stack:
            if isinstance(part, DistributedOptimizer):
                stack.enter_context(_bucket_padding_kept(part))
            found = part.sharded_state_dict(models, is_loading=saved is not None, metadata=metadata)
        if _MAIN_WEIGHTS in found:  # lists, a group of parameters each: Megatron cannot load an empty one among them
            found[_MAIN_WEIGHTS] = {number: group for number, group in enumerate(found[_MAIN_WEIGHTS]) if group}
        state["optimizer"][i] = found
    # Only tensors travel. How parameters are grouped depends on the layout (Megatron has an optimizer of its own for
    # experts over ep), and the groups' settings are those of the phase, which `begin` gave.
    dict_list_map_inplace(_kept_here, state["optimizer"])
    return state | models


def _parts(optimizer: PolicyOptimizer) -> Iterator[tuple[int, Any]]:
    """Megatron's optimizers by number, but for a distributed one without weights: that can't be saved or loaded.

    It is the experts', where they have one of their own, on a pipeline stage without layers.
    """
    for i, part in enumerate(optimizer.megatron.chained_optimizers):
        if not isinstance(part, DistributedOptimizer) or part.buffers:
            yield i, part


def _extra_states(model: torch.nn.Module, state: Iterable[str]) -> dict[str, tuple[torch.nn.Module, int]]:
    """What Transformer Engine would keep in a pickle: the module of each such key, and which of its GEMMs it is."""
    found = ((key, re.fullmatch(r"(.*)\._extra_state(\d*)", key)) for key in state)
    return {key: (model.get_submodule(match[1]), int(match[2] or 0)) for key, match in found if match}


def _only_scales(model: torch.nn.Module, state: dict[str, Any], saved: Container[str] | None) -> None:
    """Leave of the extra states the scales of fp8_delayed that there are, as tensors: each device has others."""
    for key, (module, gemm) in _extra_states(model, state).items():
        if saved is None and (values := scales(module)):
            state[key].data = values[gemm]
        elif saved is None or state[key].unique_key not in saved:
            del state[key]


def _saved_scales(model: torch.nn.Module, state: dict[str, Any]) -> dict[torch.nn.Module, list[torch.Tensor]]:
    """Take them out of a loaded state, which is then free of anything that a module might unpickle."""
    values: dict[torch.nn.Module, dict[int, torch.Tensor]] = {}
    for key, (module, gemm) in _extra_states(model, state).items():
        value = state.pop(key)
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32 and hasattr(module, "fp8_meta"):
            values.setdefault(module, {})[gemm] = value
    for name, module in model.named_modules():
        if type(module).get_extra_state is not torch.nn.Module.get_extra_state:  # it asks for one
            state[f"{name}._extra_state"] = torch.empty(0, dtype=torch.uint8)
    return {module: [of_gemms[gemm] for gemm in sorted(of_gemms)] for module, of_gemms in values.items()}


def _restore_scales(saved: Mapping[torch.nn.Module, list[torch.Tensor]]) -> None:
    for module, values in saved.items():
        set_scales(module, values)


def _kept_here(value: Any) -> Any:
    return value if isinstance(value, ShardedBase | LocalNonpersistentObject) else LocalNonpersistentObject(value)


def _completed(state: dict[str, Any], part: MegatronOptimizer, steps: int) -> dict[str, Any]:
    """The state of one Megatron optimizer with what was left out of it: empty parts, and Adam's step count where that
    optimizer looks for it."""
    inner = state.get("optimizer", state)
    for group in inner["param_groups"]:
        group["step"] = steps
    if not isinstance(part, DistributedOptimizer):
        inner.setdefault("state", {})
        if isinstance(part.optimizer, torch.optim.AdamW):
            inner["state"]["common_step"] = torch.tensor(float(steps))
        if isinstance(part, Float16OptimizerWithFloat16Params):
            groups = state.get(_MAIN_WEIGHTS, {})
            state[_MAIN_WEIGHTS] = [groups.get(number, []) for number in range(len(inner["param_groups"]))]
    return state


@contextmanager
def _bucket_padding_kept(optimizer: Any) -> Iterator[None]:
    """Megatron gathers a buffer's state without the padding between buckets, then cuts it at offsets that count it.

    Left alone, the optimizer state of a pipeline stage with tied embeddings (two buckets) is saved shifted, silently.
    """
    original = optimizer.get_parameter_state_dp_zero

    def get_state(*args: Any, **kwargs: Any) -> dict[Any, Any] | None:
        state = original(*args, **kwargs)
        if state is None:  # another replica has it
            return None
        for index, buffer in enumerate(optimizer.buffers):
            for tensors in state[index].values():
                for key, flat in tensors.items():
                    if isinstance(flat, torch.Tensor):
                        tensors[key] = _with_padding(flat, buffer)
        return state

    optimizer.get_parameter_state_dp_zero = get_state
    try:
        yield
    finally:
        del optimizer.get_parameter_state_dp_zero


def _with_padding(flat: torch.Tensor, buffer: Any) -> torch.Tensor:
    padded = flat.new_zeros(buffer.numel)
    start = 0
    for bucket in buffer.buckets:
        stop = start + bucket.numel_unpadded
        padded[bucket.offset : bucket.offset + stop - start] = flat[start:stop]
        start = stop
    return padded


@contextmanager
def _step_left_alone(optimizer: Any) -> Iterator[None]:
    """Torch's AdamW keeps `step` beside the moments; Megatron looks for it in the checkpoint, where it isn't."""
    original = optimizer._set_main_param_and_optimizer_states

    def set_states(parameter: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        group, order = optimizer.model_param_group_index_map[parameter]
        state = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][order]]
        original(parameter, {**tensors, "step": state["step"]} if "step" in state else tensors)

    optimizer._set_main_param_and_optimizer_states = set_states
    try:
        yield
    finally:
        del optimizer._set_main_param_and_optimizer_states
