"""How a model family's Megatron parameters are made of Hugging Face tensors: the words its description is written in.

A family (`qwen2.py`, `llama.py`) lists its parameters in a fixed order; what splitting over tensor-parallel ranks and
merging back mean is here, once. Imports torch only where a tensor is touched: what starts a run reads families.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rloop_mcore.errors import UserError
from rloop_mcore.platform.files import read_json
from rloop_mcore.weights.tensor_files import FLOATS, TensorEntry, check_tensors

if TYPE_CHECKING:
    import torch

    from rloop_mcore.weights.hf_folder import TensorReader


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


_ALL = (slice(None),)


@dataclass(frozen=True)
class Piece:
    """A block that an HF tensor and a shard of a Megatron parameter have in common: where it is in either."""

    source: int  # of the parameter's `sources`
    in_source: tuple[slice, ...]
    in_shard: tuple[slice, ...]


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

    def shape(self, ranks: int) -> tuple[int, ...]:
        """Of each of the `ranks` shards."""
        first = self.sources[0].shape
        if self.split is Split.INPUT:
            return (first[0], first[1] // ranks)
        rows = sum(source.shape[0] for source in self.sources)
        divisor = 1 if self.split is Split.REPLICATED else ranks
        return (-(-rows // divisor), *first[1:])  # the vocabulary's is padded, the others divide

    def pieces(self, rank: int, ranks: int) -> list[Piece]:
        """What shard `rank` of `ranks` has of the sources; rows of a vocabulary's padding are in none."""
        if self.split is Split.REPLICATED:
            return [Piece(0, _ALL, _ALL)]
        if self.split is Split.INPUT:
            columns = self.shape(ranks)[1]
            return [Piece(0, (slice(None), slice(rank * columns, (rank + 1) * columns)), _ALL)]
        rows = self.shape(ranks)[0]
        first, last = rank * rows, (rank + 1) * rows
        groups = 1 if self.split is Split.VOCABULARY else self.groups or ranks
        sizes = [source.shape[0] // groups for source in self.sources]
        found = []
        for group in range(first // sum(sizes), min(-(-last // sum(sizes)), groups)):
            begin = group * sum(sizes)  # of this group's part of the source, in the fused rows of all shards
            for source, size in enumerate(sizes):
                low, high = max(begin, first), min(begin + size, last)
                if low < high:
                    in_source = slice(group * size + low - begin, group * size + high - begin)
                    found.append(Piece(source, (in_source,), (slice(low - first, high - first),)))
                begin += size
        return found

    def shard(
        self, read: Callable[[str], Any], rank: int, ranks: int, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Shard `rank` of `ranks`, in `dtype` (None: the sources').

        `read` gives an HF tensor by name; only the slices needed are taken.
        """
        pieces = self.pieces(rank, ranks)
        parts = [_part(read(self.sources[piece.source].name), piece.in_source) for piece in pieces]
        if len(parts) == 1 and parts[0].shape == self.shape(ranks):
            return parts[0].to(dtype or parts[0].dtype)
        import torch

        make = torch.zeros if self.split is Split.VOCABULARY else torch.empty
        shard = make(self.shape(ranks), dtype=dtype or read(self.sources[0].name)[:0].dtype)
        for piece, part in zip(pieces, parts, strict=True):
            shard[piece.in_shard] = part
        return shard

    def merge(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The full HF tensors, in the order of `sources`, from the shards of all tensor-parallel ranks."""
        pieces = [(piece, shard) for rank, shard in enumerate(shards) for piece in self.pieces(rank, len(shards))]
        if len(pieces) == len(self.sources):  # each is one block of one shard
            return [_part(shard, piece.in_shard) for piece, shard in pieces]
        tensors = [shards[0].new_empty(source.shape) for source in self.sources]
        for piece, shard in pieces:
            tensors[piece.source][piece.in_source] = _part(shard, piece.in_shard)
        return tensors


def _part(tensor: Any, block: tuple[slice, ...]) -> torch.Tensor:
    """The block of a tensor, or of one that is read when it is sliced."""
    part: torch.Tensor = tensor[block if len(block) > 1 else block[0]]
    return part


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

    def size(self, key: str, default: int | None = None, most: int = 10**7) -> int:
        """A number of things. Raises UserError where it is none, or missing without a default."""
        value = self[key] if default is None else self.get(key, default)
        if type(value) is not int or not 1 <= value <= most:
            raise UserError(f"{self.file}: {key} is {value!r}; it has to be a whole number from 1 to {most}.")
        return value

    def positive(self, key: str, value: Any) -> Any:
        """The `value` that was found for `key`. Raises UserError unless it is a finite number above 0."""
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise UserError(f"{self.file}: {key} is {value!r}; it has to be a number above 0.")
        return value

    def flag(self, key: str) -> bool:
        """False where it is missing. Raises UserError where it is neither true nor false."""
        value = self.get(key, False)
        if not isinstance(value, bool):
            raise UserError(f"{self.file}: {key} is {value!r}; it has to be true or false.")
        return value

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

    def exported(self, config: HfConfig) -> list[Parameter]:
        """The parameters that an HF folder is made of, in order: all but copies."""
        return [parameter for parameter in self.parameters(config) if not parameter.copy]

    def shapes(self, config: HfConfig) -> dict[str, tuple[int, ...]]:
        """The HF tensors that the model is made of."""
        return {source.name: source.shape for parameter in self.exported(config) for source in parameter.sources}

    def ignored(self, config: HfConfig) -> tuple[str, ...]:
        """Names of tensors that a folder may hold beside them; one that begins with a dot is the end of a name."""
        tied = ("lm_head.weight",) if config.flag("tie_word_embeddings") else ()
        return (".rotary_emb.inv_freq", *tied)  # the first is a buffer that old Llama files carry

    def check_headers(self, config: HfConfig, entries: Mapping[str, TensorEntry]) -> None:
        """Raises UserError unless `entries` are exactly the tensors of the model that `config` describes."""
        check_tensors(config.file.parent, entries, self.shapes(config), self.ignored(config))

    def check(self, config: HfConfig, reader: TensorReader) -> None:
        """As `check_headers`; what ties the embeddings and has another output layer is refused too."""
        self.check_headers(config, reader.entries)
        embedding, output = "model.embed_tokens.weight", "lm_head.weight"
        if not config.flag("tie_word_embeddings") or output not in reader.entries:
            return
        import torch

        of_numbers = reader.entries[output].dtype in FLOATS
        if not of_numbers or not torch.equal(reader.tensor(output), reader.tensor(embedding)):
            raise UserError(
                f"{config.file} ties {output} to {embedding}, and {reader.folder} has another one: set "
                "tie_word_embeddings to false, or remove it."
            )


@dataclass(frozen=True)
class Place:
    """Where a parameter is in a Megatron checkpoint: layers, and a layer's experts, are stacked in one tensor a key."""

    keys: tuple[str, ...]  # where Transformer Engine's modules look for it, then where Megatron's local ones do too
    stack: tuple[int, ...]  # sizes of the dimensions before the parameter's own
    index: tuple[int, ...]  # its own in these


def place(parameter: Parameter, layers: int, experts: int) -> Place:
    """The place of a parameter of a model with so many layers, and experts a layer (0: dense)."""
    found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", parameter.name)
    if found is None:
        return Place((parameter.name,), (), ())
    layer, name = int(found[1]), found[2]
    expert = re.fullmatch(r"mlp\.experts\.local_experts\.(\d+)\.(.+)", name)
    if expert is not None:
        key = f"decoder.layers.mlp.experts.experts.{expert[2]}"
        return Place((key,), (layers, experts), (layer, int(expert[1])))
    own = {norm: fused for fused, norm in _FUSED_NORMS.items()}.get(name, name)
    names = [name, own] if experts and name.startswith("pre_mlp_layernorm") else [own]
    return Place(tuple(f"decoder.layers.{alternative}" for alternative in names), (layers,), (layer,))


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
