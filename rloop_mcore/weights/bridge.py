"""Between Hugging Face folders and Megatron's shards, for every family that is described."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from rloop_mcore.errors import UserError
from rloop_mcore.types import Policy
from rloop_mcore.weights import llama, qwen2
from rloop_mcore.weights.family import Family, HfConfig, Parameter, Split, canonical_name
from rloop_mcore.weights.hf_folder import TensorReader, write_folder

FAMILIES = (qwen2.FAMILY, llama.FAMILY)
_IGNORED = ("rotary_emb.inv_freq",)  # a buffer that old Llama files carry


class HfBridge:
    """Implements `protocols.WeightBridge` for the model of one HF folder.

    The folder gives the architecture, and the config and tokenizer files of what is saved. `family` is a family's name,
    or auto: the one that config.json names. Raises UserError where no family fits or config.json cannot be honoured.
    """

    def __init__(self, folder: Path, family: str = "auto") -> None:
        self.folder = folder
        config = HfConfig.read(folder)
        self._family = _choose_family(config, family)
        self._architecture = self._family.architecture(config)
        self._parameters = self._family.parameters(config)
        self._shapes = {s.name: s.shape for p in self._parameters if not p.copy for s in p.sources}

    def architecture(self) -> dict[str, Any]:
        """Megatron settings: `{"transformer": TransformerConfig fields, "gpt": GPTModel arguments}`."""
        return self._architecture

    def load(self, chunks: Sequence[torch.nn.Module], path: Path) -> None:
        """Fill this rank's shards of every pipeline chunk from the safetensors of the HF folder `path`.

        The folder is checked whole first: on a UserError no parameter has changed.
        """
        if self._family.architecture(HfConfig.read(path)) != self._architecture:
            raise UserError(f"{path}/config.json describes another model than {self.folder}/config.json.")
        reader = TensorReader(path)
        tied = self._architecture["gpt"]["share_embeddings_and_output_weights"]
        reader.check(self._shapes, ignored=(*_IGNORED, *(["lm_head.weight"] if tied else [])))
        held = _named_parameters(chunks)
        known = {parameter.name: parameter for parameter in self._parameters}
        rank = parallel_state.get_tensor_model_parallel_rank()
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        for name, tensor in held.items():
            if name not in known:
                raise RuntimeError(f"family {self._family.name} does not describe Megatron parameter {name}")
            shard = known[name].shard(reader.tensor, tensor.shape, rank, ranks)
            if shard.shape != tensor.shape:
                raise RuntimeError(f"{name}: read {tuple(shard.shape)} for a shard of {tuple(tensor.shape)}")
            tensor.data.copy_(shard)

    def export(self, chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
        """Collective: gather the shards, one parameter at a time; rank 0 yields the full HF tensors, in fixed order.

        The other ranks have to iterate too and yield nothing. A tensor is good until the next update of the weights.
        """
        if parallel_state.get_data_parallel_rank(with_context_parallel=True) != 0:
            return  # a replica of what rank 0's tensor and pipeline ranks hold
        held = _named_parameters(chunks)
        dtype = next(iter(held.values())).dtype
        exported = [parameter for parameter in self._parameters if not parameter.copy]
        for parameter, stage in zip(exported, _stages(exported, held), strict=True):
            tensors = _merge_over_tensor_ranks(parameter, held.get(parameter.name))
            if parallel_state.get_tensor_model_parallel_rank() == 0:
                tensors = _move_to_first_stage(parameter, stage, tensors, dtype)
            if dist.get_rank() == 0:
                yield from zip((source.name for source in parameter.sources), tensors, strict=True)

    def save(self, tensors: Iterator[tuple[str, torch.Tensor]], path: Path) -> Policy:
        """Rank 0: write an HF folder (safetensors, config, tokenizer files) atomically and digest it."""
        return write_folder(path, self._whole(tensors), self.folder)

    def _whole(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass the tensors through; raise at the end unless they were the whole model."""
        seen = {}
        for name, tensor in tensors:
            seen[name] = tuple(tensor.shape)
            yield name, tensor
        if seen != self._shapes:
            wrong = sorted(name for name, _ in seen.items() ^ self._shapes.items())
            raise RuntimeError(f"not the tensors of {self.folder}: {', '.join(wrong[:5])} missing or of another shape")


def _choose_family(config: HfConfig, family: str) -> Family:
    if family != "auto":
        named = {candidate.name: candidate for candidate in FAMILIES}
        if family not in named:
            raise UserError(f"model.family is {family!r}; it is one of auto, {', '.join(sorted(named))}.")
        return named[family]
    architectures = config["architectures"]
    for candidate in FAMILIES:
        if architectures == [candidate.hf_architecture]:
            return candidate
    supported = ", ".join(candidate.hf_architecture for candidate in FAMILIES)
    raise UserError(f"{config.file}: architectures is {architectures}; supported are {supported}.")


def _named_parameters(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by canonical name, layers by their global number (Megatron names them by chunk)."""
    held = {}
    for chunk in chunks:
        while isinstance(wrapped := getattr(chunk, "module", None), torch.nn.Module):  # DDP, Float16Module
            chunk = wrapped
        layers = getattr(chunk, "decoder").layers  # noqa: B009 (a torch module's attributes have no type)
        offset = layers[0].layer_number - 1 if len(layers) else 0
        for name, parameter in chunk.named_parameters():
            parts = canonical_name(name).split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(int(parts[2]) + offset)
            held[".".join(parts)] = parameter
    return held


def _stages(parameters: Sequence[Parameter], held: dict[str, torch.nn.Parameter]) -> list[int]:
    """The pipeline rank that holds each parameter. Collective over the pipeline group."""
    rank = parallel_state.get_pipeline_model_parallel_rank()
    device = next(iter(held.values())).device
    stages = torch.tensor([rank if parameter.name in held else -1 for parameter in parameters], device=device)
    dist.all_reduce(stages, op=dist.ReduceOp.MAX, group=parallel_state.get_pipeline_model_parallel_group())
    owners = stages.tolist()
    for parameter, owner in zip(parameters, owners, strict=True):
        if owner < 0:
            raise RuntimeError(f"no pipeline stage holds Megatron parameter {parameter.name}")
    return owners


def _merge_over_tensor_ranks(parameter: Parameter, shard: torch.Tensor | None) -> list[torch.Tensor]:
    """The full HF tensors, on the first tensor-parallel rank of the stage that holds the parameter; else nothing."""
    if shard is None:
        return []
    group = parallel_state.get_tensor_model_parallel_group()
    ranks, first = dist.get_world_size(group), dist.get_rank(group) == 0
    shard = shard.detach().contiguous()
    if ranks == 1 or parameter.split is Split.REPLICATED:
        return parameter.merge([shard]) if first else []
    shards = [torch.empty_like(shard) for _ in range(ranks)] if first else None
    dist.gather(shard, shards, group=group, group_dst=0)
    return parameter.merge(shards) if shards else []


def _move_to_first_stage(
    parameter: Parameter, stage: int, tensors: list[torch.Tensor], dtype: torch.dtype
) -> list[torch.Tensor]:
    """Send a parameter's HF tensors from the stage that holds it to the first; other stages do nothing."""
    group = parallel_state.get_pipeline_model_parallel_group()
    rank = dist.get_rank(group)
    if stage != 0 and rank == stage:
        for tensor in tensors:
            dist.send(tensor.contiguous(), group=group, group_dst=0)
    if stage != 0 and rank == 0:
        device = torch.device("cuda") if dist.get_backend(group) == "nccl" else torch.device("cpu")
        tensors = [torch.empty(source.shape, dtype=dtype, device=device) for source in parameter.sources]
        for tensor in tensors:
            dist.recv(tensor, group=group, group_src=stage)
    return tensors
