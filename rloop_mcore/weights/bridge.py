"""Between Hugging Face folders and Megatron's shards, for every family that is described."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from rloop_mcore.errors import UserError
from rloop_mcore.platform.precision import assign
from rloop_mcore.protocols import Scattered
from rloop_mcore.types import Policy
from rloop_mcore.weights.families import choose_family
from rloop_mcore.weights.family import HfConfig, canonical_name
from rloop_mcore.weights.gather import ScatteredTensor, scattered, shard_number
from rloop_mcore.weights.hf_folder import TensorReader, check_finite, write_folder


class HfBridge:
    """Implements `protocols.WeightBridge` for the model of one HF folder.

    The folder gives the architecture, and the config and tokenizer files of what is saved. `family` is a family's name,
    or auto: the one that config.json names. Raises UserError where no family fits or config.json cannot be honoured.
    """

    def __init__(self, folder: Path, family: str = "auto") -> None:
        self.folder = folder
        config = HfConfig.read(folder)
        self._family = choose_family(config, family)
        self._architecture = self._family.architecture(config)
        self._parameters = self._family.parameters(config)
        self._exported = self._family.exported(config)
        self._shapes = self._family.shapes(config)

    def architecture(self) -> dict[str, Any]:
        """Megatron settings: `{"transformer": TransformerConfig fields, "gpt": GPTModel arguments}`."""
        return self._architecture

    @property
    def largest(self) -> int:
        """Elements of the largest tensor of the HF folder."""
        return max(map(prod, self._shapes.values()))

    @torch.no_grad()
    def load(self, chunks: Sequence[torch.nn.Module], path: Path) -> None:
        """Fill this rank's shards of every pipeline chunk from the safetensors of the HF folder `path`.

        The folder is checked whole first: on a UserError no parameter has changed, but where a tensor holds NaN or an
        infinity, which is found on the way.
        """
        config = HfConfig.read(path)
        if self._family.architecture(config) != self._architecture:
            raise UserError(f"{path}/config.json describes another model than {self.folder}/config.json.")
        reader = TensorReader(path)
        self._family.check(config, reader)
        held = _named_parameters(chunks)
        known = {parameter.name: parameter for parameter in self._parameters}
        for name, tensor in held.items():
            if name not in known:
                raise RuntimeError(f"family {self._family.name} does not describe Megatron parameter {name}")
            shard = known[name].shard(reader.tensor, *shard_number(known[name]))
            if shard.shape != tensor.shape:
                raise RuntimeError(f"{name}: read {tuple(shard.shape)} for a shard of {tuple(tensor.shape)}")
            check_finite(", ".join(source.name for source in known[name].sources), shard, path)
            assign(tensor, shard)

    def export(self, chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, ScatteredTensor]]:
        """Collective: rank 0 yields the HF tensors in fixed order, each to be gathered before the next.

        The other ranks have to iterate too and yield nothing. A tensor is good until the next update of the weights.
        """
        return scattered(self._exported, _named_parameters(chunks))

    def save(self, tensors: Iterator[tuple[str, Scattered]], path: Path) -> Policy:
        """Rank 0: write an HF folder (safetensors, config, tokenizer files) atomically and digest it."""
        gathered = ((name, tensor.gather()) for name, tensor in tensors)
        return write_folder(path, self._shapes, gathered, self.folder)


def _named_parameters(chunks: Sequence[torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters by canonical name."""
    held = {}
    for chunk in chunks:
        while isinstance(wrapped := getattr(chunk, "module", None), torch.nn.Module):  # DDP, Float16Module
            chunk = wrapped
        model: Any = chunk  # a torch module's attributes have no type
        layers, experts = model.decoder.layers, model.config.num_moe_experts or 0
        first_layer = layers[0].layer_number - 1 if len(layers) else 0
        ranks = parallel_state.get_expert_model_parallel_world_size()
        first_expert = experts // ranks * parallel_state.get_expert_model_parallel_rank()
        for name, parameter in model.named_parameters():
            held[canonical_name(name, first_layer, first_expert)] = parameter
    return held
