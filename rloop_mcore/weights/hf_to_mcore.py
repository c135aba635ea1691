"""A Hugging Face folder into a Megatron checkpoint, section by section, without Megatron.

The source is mapped into memory, and most sections are written straight from there: only rows that are interleaved,
cut across or cast are copied. It ends by mapping every tensor back from the written files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
from rloop_mcore.weights.family import Split
from rloop_mcore.weights.hf_folder import TensorReader, check_finite, write_config
from rloop_mcore.weights.sections import Layout, Model, Section
from rloop_mcore.weights.torch_dist import BlockFile, BlockReader, finish


@dataclass(frozen=True)
class _Shard:
    """A shard of a section, to be written."""

    section: Section
    rank: int
    bytes: int  # under all its keys


def plan(
    source: Path,
    target: Path,
    layout: Layout,
    dtype: torch.dtype | None = None,
    threads: int = 1,
    family: str = "auto",
) -> Conversion:
    """Check everything that can be; `dtype` None: each tensor's own. Raises UserError, with nothing written."""
    model = Model(source, family)
    model.check(layout)
    reader = TensorReader(source)
    model.family.check(model.config, reader)
    dtypes: dict[str, torch.dtype] = {}
    for section in model.sections:
        own = _dtype(section, reader, dtype)
        if dtypes.setdefault(section.key, own) != own:
            raise UserError(f"{source}: the tensors of {section.key} differ in dtype: give --dtype.")
    shards = _by_file(model, layout, dtypes, threads)
    largest = max(section.elements * dtypes[section.key].itemsize for section in model.sections)
    run = _Run(model, layout, reader, dtypes, threads, target, Memory(AT_ONCE * largest))
    return Conversion(
        source,
        target,
        tensors=sum(len(section.names) for section in model.sections),
        files={name: sum(shard.bytes for shard in of_file) for name, of_file in shards.items()},
        largest=largest,
        warnings=warnings(source),
        run=lambda progress: run.convert(shards, progress),
    )


def _dtype(section: Section, reader: TensorReader, wanted: torch.dtype | None) -> torch.dtype:
    """What a section becomes. Raises UserError where its tensors differ."""
    own = {reader.dtype(name) for name in section.names}
    if wanted is None and len(own) > 1:
        raise UserError(f"{reader.folder}: {', '.join(section.names)} differ in dtype, and become one: give --dtype.")
    return wanted or own.pop()


def _by_file(model: Model, layout: Layout, dtypes: dict[str, torch.dtype], threads: int) -> dict[str, list[_Shard]]:
    """The shards of each file: one a rank, or so many that every thread has one."""
    ranks = layout.tp * layout.pp * layout.ep
    of_rank: list[list[_Shard]] = [[] for _ in range(ranks)]
    for section in model.sections:
        for tp_rank in range(layout.tp):
            rank = model.writer(section, tp_rank, layout)
            if rank is not None:
                size = prod(section.parameter.shape(layout.tp)) * dtypes[section.key].itemsize
                of_rank[rank].append(_Shard(section, tp_rank, size * len(section.place.keys)))
    parts = -(-threads // ranks)
    files: dict[str, list[_Shard]] = {}
    for rank, shards in enumerate(of_rank):
        total, before = sum(shard.bytes for shard in shards), 0
        for shard in shards:
            files.setdefault(f"__{rank}_{before * parts // max(total, 1)}.distcp", []).append(shard)
            before += shard.bytes
    return files


@dataclass
class _Run:
    model: Model
    layout: Layout
    reader: TensorReader
    dtypes: dict[str, torch.dtype]
    threads: int
    target: Path
    memory: Memory

    def convert(self, shards: dict[str, list[_Shard]], progress: Progress) -> None:
        with new_directory(self.target, replace=False) as folder:
            files: list[BlockFile] = []
            first = next(iter(shards))
            writes = [
                partial(self._write, folder / name, of_file, files, name == first, progress)
                for name, of_file in shards.items()
            ]
            in_threads(writes, self.threads, self.memory)
            tensors = {
                key: (self.dtypes[section.key], self.model.global_shape(section, self.layout.tp))
                for section in self.model.sections
                for key in section.place.keys
            }
            finish(folder, files, tensors)
            (folder / HF_FILES).mkdir()
            write_config(folder / HF_FILES, self.reader.folder, set(self.dtypes.values()))
            written = BlockReader(folder, checksums=False)
            sections, count = self.model.sections, self.threads
            checks = [partial(self._verify, written, sections[n::count], progress) for n in range(count)]
            in_threads(checks, count, self.memory)

    def _write(
        self, path: Path, shards: Sequence[_Shard], files: list[BlockFile], is_first: bool, progress: Progress
    ) -> None:
        """One file of shards, appended to `files`. The first holds the extra states too."""
        file = BlockFile(path)
        files.append(file)
        for shard in shards:
            parameter, dtype = shard.section.parameter, self.dtypes[shard.section.key]
            cut = self.layout.tp > 1 and parameter.split in (Split.INPUT, Split.VOCABULARY)
            copied = cut or shard.section.interleaved or self._is_cast(shard.section)
            with self.memory.of(shard.bytes * copied):
                tensor = parameter.shard(self.reader.tensor, shard.rank, self.layout.tp, dtype)
                for key in shard.section.place.keys:
                    file.add(key, shard.section.box(shard.rank, self.layout.tp), tensor)
            progress(shard.bytes)
        for key in self.model.extra_states() if is_first else ():
            file.add_nothing(key)
        file.close()

    def _is_cast(self, section: Section) -> bool:
        return any(self.reader.dtype(name) != self.dtypes[section.key] for name in section.names)

    def _verify(self, written: BlockReader, sections: Sequence[Section], progress: Progress) -> None:
        """Compare every HF tensor with what the checkpoint has of it."""
        for section in sections:
            dtype, box = self.dtypes[section.key], section.box()
            for name in section.names:
                check_finite(name, self.reader.tensor(name), self.reader.folder)
            for key in section.place.keys:
                copies = section.interleaved + self._is_cast(section) + (not written.is_one_block(key, box))
                with self.memory.of(section.elements * dtype.itemsize * copies):
                    whole = written.read(key, box).view(section.parameter.shape(1))
                    for name, tensor in zip(section.names, section.parameter.merge([whole]), strict=True):
                        compare(name, tensor, checksum(cast(name, self.reader.tensor(name), dtype)), self.target)
            progress(section.elements * dtype.itemsize)
