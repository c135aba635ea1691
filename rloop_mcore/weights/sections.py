"""How a model lies in a Megatron checkpoint, whatever layout wrote it: what conversions go through."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from rloop_mcore.errors import UserError
from rloop_mcore.weights.families import check_config, choose_family
from rloop_mcore.weights.family import Parameter, Place, Split, place
from rloop_mcore.weights.torch_dist import Box


@dataclass(frozen=True)
class Layout:
    """The ranks a checkpoint is written for: any layout loads it, this one without reading anything twice."""

    tp: int = 1
    pp: int = 1
    ep: int = 1


@dataclass(frozen=True)
class Section:
    """What is converted as one: a parameter, or each source of one that is fused without being interleaved."""

    parameter: Parameter
    place: Place
    row: int  # where it begins in the checkpoint's tensor

    @property
    def key(self) -> str:
        """The checkpoint's tensor."""
        return self.place.keys[0]

    @property
    def names(self) -> list[str]:
        """The HF tensors."""
        return [source.name for source in self.parameter.sources]

    @property
    def elements(self) -> int:
        return sum(prod(source.shape) for source in self.parameter.sources)

    @property
    def interleaved(self) -> bool:
        """Whether its rows stand in another order on the two sides; else it is the same bytes."""
        return len(self.parameter.sources) > 1

    def box(self, rank: int = 0, ranks: int = 1) -> Box:
        """Shard `rank` of `ranks` in the checkpoint's tensor."""
        shape = self.parameter.shape(ranks)
        corner = [self.row, *([0] * (len(shape) - 1))]
        if self.parameter.split is Split.INPUT:
            corner[1] = rank * shape[1]
        elif self.parameter.split is not Split.REPLICATED:
            corner[0] += rank * shape[0]
        return (*self.place.index, *corner), (*([1] * len(self.place.index)), *shape)


class Model:
    """What a config.json describes: its sections in the order of the HF tensors."""

    def __init__(self, folder: Path, family: str = "auto") -> None:
        """Raises UserError where no family fits, or config.json cannot be honoured."""
        self.config = check_config(folder, family)
        self.family = choose_family(self.config, family)
        parameters = self.family.exported(self.config)
        self.layers = self.config.size("num_hidden_layers")
        self.experts = sum(p.expert for p in parameters) // self.layers // 2  # of each layer; fc1 and fc2 each
        self.sections: list[Section] = []
        self._rows: dict[str, int] = {}  # of the checkpoint's tensors, stacking aside
        for parameter in parameters:
            where = place(parameter, self.layers, self.experts)
            self._rows[where.keys[0]] = sum(source.shape[0] for source in parameter.sources)
            if parameter.groups is not None:
                self.sections.append(Section(parameter, where, 0))
                continue
            row = 0
            for source in parameter.sources:
                self.sections.append(Section(replace(parameter, sources=(source,)), where, row))
                row += source.shape[0]

    def global_shape(self, section: Section, tp: int) -> tuple[int, ...]:
        """The shape of the checkpoint's tensor as tp ranks write it: a vocabulary is padded to a multiple of them."""
        shape = section.parameter.shape(1)
        rows = self._rows[section.key]
        if section.parameter.split is Split.VOCABULARY:
            rows = section.parameter.shape(tp)[0] * tp
        return (*section.place.stack, rows, *shape[1:])

    def check(self, layout: Layout) -> None:
        """Raises UserError where the model cannot be cut so."""
        for option, value in vars(layout).items():
            if value < 1:
                raise UserError(f"--{option} {value}: it is at least 1.")
        heads = self.config.size("num_attention_heads")
        if heads % layout.tp:
            raise UserError(f"--tp {layout.tp} does not divide the {heads} attention heads.")
        for section in self.sections:
            parameter = section.parameter
            size = parameter.shape(1)[1 if parameter.split is Split.INPUT else 0]
            if parameter.split in (Split.INPUT, Split.OUTPUT) and size % layout.tp:
                raise UserError(f"--tp {layout.tp} does not divide the {size} of {', '.join(section.names)}.")
        if self.layers % layout.pp:
            raise UserError(f"--pp {layout.pp} does not divide the {self.layers} layers.")
        if layout.ep > 1 and not self.experts:
            raise UserError(f"--ep {layout.ep} is for a model with experts.")
        if self.experts % layout.ep:
            raise UserError(f"--ep {layout.ep} does not divide the {self.experts} experts of a layer.")

    def writer(self, section: Section, tp_rank: int, layout: Layout) -> int | None:
        """The rank that writes this shard; None where another writes the same."""
        if section.parameter.split is Split.REPLICATED and tp_rank:
            return None
        index = section.place.index
        if index:
            stage = index[0] * layout.pp // self.layers
        else:
            stage = 0 if section.key.startswith("embedding.") else layout.pp - 1
        expert_rank = index[1] * layout.ep // self.experts if len(index) > 1 else 0
        return (stage * layout.ep + expert_rank) * layout.tp + tp_rank

    def extra_states(self) -> list[str]:
        """Keys under which Megatron's modules keep what they have beside parameters: nothing, but it looks for it."""
        attention = [f"self_attention.{name}" for name in ("linear_qkv", "linear_proj", "core_attention")]
        names = attention if self.experts else [*attention, "mlp.linear_fc1", "mlp.linear_fc2"]
        keys = [
            f"decoder.layers.{name}._extra_state/shard_{layer}_{self.layers}"
            for layer in range(self.layers)
            for name in names
        ]
        return keys + [
            f"decoder.layers.mlp.experts.experts.{name}._extra_state/shard_{layer}.{expert}_{self.layers}.{self.experts}"
            for layer in range(self.layers)
            for expert in range(self.experts)
            for name in ("linear_fc1", "linear_fc2")
        ]
