"""A Megatron checkpoint, written at any layout, into a Hugging Face folder, section by section, without Megatron."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path

import torch

from rloop_mcore.errors import UserError
from rloop_mcore.platform.files import new_directory
from rloop_mcore.weights.conversion import (
    AT_ONCE,
    HF_FILES,
    Conversion,
    Memory,
    Progress,
    cast,
    checksum,
    compare,
    in_threads,
    warnings,
)
from rloop_mcore.weights.family import Place, Split
from rloop_mcore.weights.hf_folder import Plan, TensorReader, TensorWriter, check_finite, files_of, write_config
from rloop_mcore.weights.sections import Model, Section
from rloop_mcore.weights.torch_dist import BlockReader

_OF_THE_MODEL = ("embedding.", "decoder.", "output_layer.")


def plan(
    source: Path,
    target: Path,
    dtype: torch.dtype | None = None,
    threads: int = 1,
    config: Path | None = None,
    trust: bool = False,
    family: str = "auto",
) -> Conversion:
    """Check everything that can be; `dtype` None: each tensor's own. Raises UserError, with nothing written.

    config: an HF folder of the model (None: what a checkpoint of ours has of it); trust: see `check_manifest`.
    """
    reader = BlockReader(source, trust)
    files = config or source / HF_FILES
    if not files.is_dir():
        raise UserError(f"{files} is no folder: give --config, an HF folder with the model's config.json.")
    model = Model(files, family)
    sections = [_found(section, model, reader) for section in model.sections]
    for key in {section.key for section in sections}:
        reader.check(key)
    _check_extra(model, sections, reader)
    tensors: Plan = {
        s.name: (dtype or reader.tensors[section.key].dtype, s.shape)
        for section in sections
        for s in section.parameter.sources
    }
    largest = max(section.elements * tensors[section.names[0]][0].itemsize for section in sections)
    run = _Run(sections, reader, tensors, threads, target, Memory(AT_ONCE * largest))
    sizes = {name: prod(shape) * of.itemsize for name, (of, shape) in tensors.items()}
    return Conversion(
        source,
        target,
        tensors=len(tensors),
        files={file: sum(sizes[name] for name in names) for file, names in files_of(tensors).items()},
        largest=largest,
        warnings=[*warnings(files), *_dropped(sections, reader)],
        run=lambda progress: run.convert(files, progress),
    )


def _found(section: Section, model: Model, reader: BlockReader) -> Section:
    """The section under the key that this checkpoint has it under. Raises UserError where it has none, or another."""
    stack, index = section.place.stack, section.place.index
    places = [Place((key,), stack, index) for key in section.place.keys]
    if stack:  # a checkpoint of layers that are not all alike has a tensor for each
        prefix, layer = "decoder.layers.", index[0]
        places += [
            Place((key.replace(prefix, f"{prefix}{layer}.", 1),), stack[1:], index[1:]) for key in section.place.keys
        ]
    here = next((p for p in places if p.keys[0] in reader.tensors), None)
    if here is None:
        raise UserError(f"{reader.folder} lacks tensor {section.key}, which {model.config.file} calls for.")
    expected = (*here.stack, *model.global_shape(section, 1)[len(stack) :])
    found = reader.tensors[here.keys[0]].shape
    rows = len(here.stack)
    padded = (
        section.parameter.split is Split.VOCABULARY and len(found) == len(expected) and found[rows] > expected[rows]
    )
    if found != expected and not (padded and found[rows + 1 :] == expected[rows + 1 :]):
        raise UserError(
            f"{reader.folder}: tensor {here.keys[0]} has shape {list(found)}, {model.config.file} calls for "
            f"{list(expected)}."
        )
    return replace(section, place=here)


def _check_extra(model: Model, sections: Sequence[Section], reader: BlockReader) -> None:
    """Raises UserError where the checkpoint has a tensor of the model that the config does not know."""
    known = {section.key for section in sections}
    known |= {key for section in model.sections for key in section.place.keys}
    output, embedding = reader.tensors.get("output_layer.weight"), "embedding.word_embeddings.weight"
    if model.config.flag("tie_word_embeddings") and output is not None:
        known.add("output_layer.weight")
        reader.check("output_layer.weight")
        whole = ((0,) * len(output.shape), output.shape)
        same = output.shape == reader.tensors[embedding].shape
        if not same or not torch.equal(reader.read("output_layer.weight", whole), reader.read(embedding, whole)):
            raise UserError(
                f"{reader.folder} has an output_layer.weight of its own, and {model.config.file} ties it to the "
                "embedding: set tie_word_embeddings to false."
            )
    for key in sorted(reader.tensors.keys() - known):
        if key.startswith(_OF_THE_MODEL) and "._extra_state" not in key:
            raise UserError(f"{reader.folder} holds tensor {key}, which {model.config.file} does not call for.")


def _dropped(sections: Sequence[Section], reader: BlockReader) -> list[str]:
    """Warnings of rows that a vocabulary has beyond the config's."""
    found = []
    for section in sections:
        rows, wanted = reader.tensors[section.key].shape[0], section.parameter.shape(1)[0]
        if section.parameter.split is Split.VOCABULARY and rows > wanted:
            found.append(f"{section.key} has {rows} rows and the config's vocab_size is {wanted}: the rest is dropped.")
    return found


@dataclass
class _Run:
    sections: list[Section]
    reader: BlockReader
    tensors: Plan
    threads: int
    target: Path
    memory: Memory
    sums: dict[int, str] = field(default_factory=dict, init=False)

    def _dtype(self, section: Section) -> torch.dtype:
        return self.tensors[section.names[0]][0]

    def convert(self, files: Path, progress: Progress) -> None:
        count = self.threads
        turns = [range(n, len(self.sections), count) for n in range(count)]
        with new_directory(self.target, replace=False) as folder:
            write_config(folder, files, {dtype for dtype, _ in self.tensors.values()})
            with TensorWriter(folder, self.tensors) as writer:
                in_threads([partial(self._write, writer, turn, progress) for turn in turns], count, self.memory)
            written = TensorReader(folder)
            in_threads([partial(self._verify, written, turn, progress) for turn in turns], count, self.memory)

    def _write(self, writer: TensorWriter, turn: Sequence[int], progress: Progress) -> None:
        for number in turn:
            section = self.sections[number]
            dtype, stored = self._dtype(section), self.reader.tensors[section.key].dtype
            copies = section.interleaved + (dtype != stored)
            copies += not self.reader.is_one_block(section.key, section.box())
            with self.memory.of(section.elements * max(dtype.itemsize, stored.itemsize) * copies):
                whole = self.reader.read(section.key, section.box()).view(section.parameter.shape(1))
                check_finite(", ".join(section.names), whole, self.reader.folder)
                whole = cast(", ".join(section.names), whole, dtype)
                self.sums[number] = checksum(whole)
                for name, tensor in zip(section.names, section.parameter.merge([whole]), strict=True):
                    writer.write(name, tensor)
            progress(section.elements * dtype.itemsize)

    def _verify(self, written: TensorReader, turn: Sequence[int], progress: Progress) -> None:
        """Compare every part of the checkpoint with what the HF tensors make of it."""
        for number in turn:
            section = self.sections[number]
            size = section.elements * self._dtype(section).itemsize
            with self.memory.of(size * section.interleaved):
                shard = section.parameter.shard(written.tensor, 0, 1)
                compare(", ".join(section.names), shard, self.sums[number], self.target)
            progress(size)
