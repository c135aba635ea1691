"""How a model family's Megatron parameters are made of Hugging Face tensors: the words its description is written in.

A family (`qwen2.py`, `llama.py`) lists its parameters in a fixed order; what splitting over tensor-parallel ranks and
merging back mean is here, once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from rloop_mcore.errors import UserError
from rloop_mcore.weights.tensor_files import read_json


class Split(Enum):
    """How a parameter is spread over the tensor-parallel ranks."""

    REPLICATED = "replicated"
    OUTPUT = "output"  # by dimension 0, Megatron's ColumnParallelLinear
    INPUT = "input"  # by dimension 1, Megatron's RowParallelLinear
    VOCABULARY = "vocabulary"  # by dimension 0, padded with zero rows to a multiple of the ranks


@dataclass(frozen=True)
class HfTensor:
    """A tensor of the Hugging Face folder."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Parameter:
    """One Megatron parameter and the HF tensors it is made of.

    `name` is Megatron's, its layers numbered from 0 over the whole model. Several sources are fused along dimension 0,
    interleaved in `groups`: group g is the g-th part of every source, one after the other. Without `groups` there is
    one a tensor-parallel rank. A `copy` is loaded and never exported (the output layer's copy of tied embeddings). An
    `expert` belongs to one expert of many and is split over the expert-tensor-parallel ranks instead.
    """

    name: str
    sources: tuple[HfTensor, ...]
    split: Split
    groups: int | None = None
    copy: bool = False
    expert: bool = False

    def shard(self, read: Callable[[str], Any], shape: torch.Size, rank: int, ranks: int) -> torch.Tensor:
        """This rank's shard, of `shape`. `read` gives an HF tensor by name; only the slices needed are taken."""
        sources = [read(source.name) for source in self.sources]
        if self.split is Split.REPLICATED:
            return sources[0][:]
        if self.split is Split.INPUT:
            return sources[0][:, rank * shape[1] : (rank + 1) * shape[1]]
        first, last = rank * shape[0], (rank + 1) * shape[0]
        if self.split is Split.VOCABULARY:
            rows = self.sources[0].shape[0]
            part = sources[0][min(first, rows) : min(last, rows)]
            return torch.cat([part, part.new_zeros(shape[0] - len(part), *shape[1:])])
        groups = self.groups or ranks
        group_rows = shape[0] * ranks // groups
        begin, end = first // group_rows, -(-last // group_rows)  # the groups this shard touches
        fused = torch.cat([self._group(sources, g, groups) for g in range(begin, end)])
        return fused[first - begin * group_rows : last - begin * group_rows]

    def merge(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The full HF tensors, in the order of `sources`, from the shards of all tensor-parallel ranks."""
        if self.split is Split.REPLICATED:
            return [shards[0]]
        if self.split is Split.INPUT:
            return [torch.cat(tuple(shards), dim=1)]
        if self.split is Split.VOCABULARY:
            return [torch.cat(tuple(shards))[: self.sources[0].shape[0]]]
        groups = self.groups or len(shards)
        if groups % len(shards):  # a group is spread over several shards
            shards = [torch.cat(tuple(shards))]
        rows = [source.shape[0] // groups for source in self.sources]
        parts = [shard.unflatten(0, (groups // len(shards), -1)).split(rows, dim=1) for shard in shards]
        return [torch.cat(of_source).flatten(0, 1) for of_source in zip(*parts, strict=True)]

    def _group(self, sources: Sequence[Any], group: int, groups: int) -> torch.Tensor:
        rows = [source.shape[0] // groups for source in self.sources]
        return torch.cat([source[group * n : (group + 1) * n] for source, n in zip(sources, rows, strict=True)])


@dataclass(frozen=True)
class HfConfig:
    """A config.json: `config["hidden_size"]` raises UserError where the key is missing."""

    file: Path
    values: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> HfConfig:
        """The config.json of an HF folder."""
        if not folder.is_dir():
            raise UserError(
                f"{folder} is not a folder; give a Hugging Face model folder (config.json and safetensors)."
            )
        return cls(folder / "config.json", read_json(folder / "config.json"))

    def __getitem__(self, key: str) -> Any:
        if self.values.get(key) is None:
            raise UserError(f"{self.file} has no {key}.")
        return self.values[key]

    def get(self, key: str, default: Any) -> Any:
        """The value of a key that config.json may leave out or set to null."""
        value = self.values.get(key)
        return default if value is None else value

    def honour(self, supported: Mapping[str, Any]) -> None:
        """Raise UserError where a key is set to anything but the one value that is supported, {key: value}."""
        for key, value in supported.items():
            if self.get(key, value) != value:
                raise UserError(f"{self.file}: {key} is {self.values[key]!r}; only {value!r} is supported.")


@dataclass(frozen=True)
class Family:
    """The description of a model family.

    `architecture` gives the Megatron settings of a config.json as {"transformer": TransformerConfig fields, "gpt":
    GPTModel arguments}, and raises UserError for one it cannot honour. `parameters` lists the model's parameters in
    the order of export.
    """

    name: str  # model.family
    hf_architecture: str  # config.json's `architectures`
    architecture: Callable[[HfConfig], dict[str, Any]]
    parameters: Callable[[HfConfig], list[Parameter]]


_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def canonical_name(name: str, first_layer: int = 0, first_expert: int = 0) -> str:
    """A Megatron parameter name as families write it.

    Megatron numbers layers by chunk and experts by rank: `first_layer` and `first_expert` are the global numbers of the
    first ones. Transformer Engine fuses the norms into the next linear layer and the experts into one grouped layer.
    """
    for fused, own in _FUSED_NORMS.items():
        name = name.replace(fused, own)
    name = re.sub(r"(?<=\.experts\.)(linear_fc[12])\.weight(\d+)$", r"local_experts.\2.\1.weight", name)
    name = re.sub(r"(?<=^decoder\.layers\.)\d+", lambda number: str(int(number[0]) + first_layer), name)
    return re.sub(r"(?<=\.local_experts\.)\d+", lambda number: str(int(number[0]) + first_expert), name)
