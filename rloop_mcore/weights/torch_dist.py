"""Megatron's checkpoints (dist_checkpointing, format torch_dist), block by block. Imports no Megatron.

A checkpoint is a folder. Its `.distcp` files hold blocks of tensors, each as torch.save writes it, one behind the
other; `.metadata` says which block of which tensor is where, `common.pt` holds what is no tensor, `metadata.json` names
the format. The first two are pickles: see `platform/manifest.py`.
"""

from __future__ import annotations

import collections
import io
import json
import mmap
import os
import pathlib
import pickle
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from rloop_mcore.errors import UserError
from rloop_mcore.platform.manifest import check_manifest, write_manifest
from rloop_mcore.weights.hf_folder import bytes_of
from rloop_mcore.weights.tensor_files import read_json

_METADATA, _COMMON, _BACKEND = ".metadata", "common.pt", "metadata.json"
_NAMES = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_STORAGES = {"FloatStorage": torch.float32, "BFloat16Storage": torch.bfloat16, "HalfStorage": torch.float16}

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes of a block in its tensor


# -- writing ----------------------------------------------------------------------------------------------------------


class BlockFile:
    """One `.distcp` file, while it is written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self.name = path.name
        self.blocks: dict[tuple[str, tuple[int, ...]], tuple[int, tuple[int, ...]]] = {}  # key, offsets: place, sizes
        self.stored: dict[MetadataIndex, _StorageInfo] = {}

    def add(self, key: str, offsets: Sequence[int], sizes: Sequence[int], tensor: torch.Tensor) -> None:
        """A block of the tensor `key`; `tensor` has its elements, in row-major order, whatever its shape."""
        begin = self._file.tell()
        # torch.save writes whole storages: this tensor's has its elements and nothing else
        own = torch.frombuffer(bytes_of(tensor), dtype=tensor.dtype).view(tuple(sizes))
        torch.save(own, self._file)
        index = MetadataIndex(key, torch.Size(offsets))
        self.stored[index] = _StorageInfo(self.name, begin, self._file.tell() - begin)
        self.blocks[key, tuple(offsets)] = (begin, tuple(sizes))

    def add_nothing(self, key: str) -> None:
        """An object that is None, in the list that Megatron puts around objects."""
        begin = self._file.tell()
        torch.save([None], self._file)
        self.stored[MetadataIndex(key)] = _StorageInfo(self.name, begin, self._file.tell() - begin)

    def close(self) -> None:
        """Make it durable."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def finish(
    folder: Path, files: Iterable[BlockFile], tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> None:
    """Complete a checkpoint of these files. `tensors`: dtype and global shape of every key that is a tensor."""
    chunks: dict[str, list[ChunkStorageMetadata]] = {key: [] for key in tensors}
    stored: dict[MetadataIndex, _StorageInfo] = {}
    for file in files:
        stored |= file.stored
        for (key, offsets), (_, sizes) in file.blocks.items():
            chunks[key].append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
    entries: dict[str, Any] = {
        key: TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), sorted(chunks[key], key=_offsets))
        for key, (dtype, shape) in tensors.items()
    }
    entries |= {index.fqn: BytesStorageMetadata() for index in stored if index.fqn not in tensors}
    (folder / _METADATA).write_bytes(pickle.dumps(Metadata(entries, storage_data=stored)))
    torch.save({"checkpoint_version": 3.0, "iteration": 0}, folder / _COMMON)
    (folder / _BACKEND).write_text(json.dumps(_NAMES), encoding="utf-8")
    write_manifest(folder)


def _offsets(chunk: ChunkStorageMetadata) -> tuple[int, ...]:
    return tuple(chunk.offsets)


# -- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint, in blocks."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    boxes: list[Box]

    @cached_property
    def _by_first(self) -> dict[int, list[Box]]:
        """The blocks by where they begin in the first dimension."""
        found: dict[int, list[Box]] = {}
        for box in self.boxes:
            found.setdefault(box[0][0], []).append(box)
        return found

    def near(self, box: Box) -> list[Box]:
        """The blocks that may have something in common with `box`: those of its layer, where layers are stacked."""
        if box[1][0] == 1 and all(sizes[0] == 1 for _, sizes in self.boxes[:1]):
            return self._by_first.get(box[0][0], [])
        return self.boxes


class BlockReader:
    """The tensors of a checkpoint, mapped into memory: what is not touched is not read."""

    def __init__(self, folder: Path, trust: bool = False) -> None:
        """Raises UserError unless it is a whole checkpoint, of ours or (`trust`) of somebody else's."""
        self.folder = folder
        if not (folder / _METADATA).exists() or read_json(folder / _BACKEND).get("sharded_backend") != "torch_dist":
            raise UserError(f"{folder} is no Megatron checkpoint of format torch_dist ({_METADATA}, {_BACKEND}).")
        check_manifest(folder, trust)
        try:
            with (folder / _METADATA).open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError) as error:
            raise UserError(f"{folder / _METADATA} cannot be read: {error}.") from error
        self._stored: dict[MetadataIndex, _StorageInfo] = metadata.storage_data
        self.tensors = {
            key: StoredTensor(
                entry.properties.dtype,
                tuple(entry.size),
                [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks],
            )
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._maps: dict[str, mmap.mmap] = {}
        for name in {info.relative_path for info in self._stored.values()}:
            self._maps[name] = self._open(name)

    def _open(self, name: str) -> mmap.mmap:
        if Path(name).name != name:
            raise UserError(f"{self.folder / _METADATA} names {name!r}, which is no file of its own folder.")
        try:
            with (self.folder / name).open("rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.folder / name} cannot be read: {error}.") from error

    def is_one_block(self, key: str, box: Box) -> bool:
        """Whether `read` needs no memory for it."""
        return any(_within(box, other) for other in self.tensors[key].near(box))

    def read(self, key: str, box: Box) -> torch.Tensor:
        """That part of the tensor `key`: over the file's bytes where one block holds it, else put together.

        Raises UserError where no block holds a part of it.
        """
        stored = self.tensors[key]
        offsets, sizes = box
        near = stored.near(box)
        for other in near:
            if _within(box, other):
                return self._block(key, other)[_slices(box, other)]
        whole, covered = torch.empty(sizes, dtype=stored.dtype), 0
        for other in near:
            common = _intersection(box, other)
            if common is not None:
                whole[_slices(common, (offsets, sizes))] = self._block(key, other)[_slices(common, other)]
                covered += prod(common[1])
        if covered != prod(sizes):
            raise UserError(
                f"{self.folder}: of tensor {key} from {list(offsets)} on, {list(sizes)}, there are {covered} of "
                f"{prod(sizes)} elements."
            )
        return whole

    def _block(self, key: str, box: Box) -> torch.Tensor:
        info = self._stored[MetadataIndex(key, torch.Size(box[0]))]
        whole = self._maps[info.relative_path]
        where = f"{self.folder / info.relative_path}, tensor {key} at byte {info.offset}"
        try:
            with zipfile.ZipFile(_Window(whole, info.offset, info.length)) as archive:
                records = {name.partition("/")[2]: archive.getinfo(name) for name in archive.namelist()}
                text = archive.read(records["data.pkl"])
            saved: _SavedTensor = _TensorUnpickler(io.BytesIO(text)).load()
            record = records[f"data/{saved.record}"]
            head = info.offset + record.header_offset
            name_length, extra_length = (int.from_bytes(whole[head + i : head + i + 2], "little") for i in (26, 28))
            flat = torch.frombuffer(
                whole, dtype=saved.dtype, count=saved.elements, offset=head + 30 + name_length + extra_length
            )
        except (zipfile.BadZipFile, pickle.UnpicklingError, KeyError, ValueError, EOFError) as error:
            raise UserError(f"{where} is no tensor of torch.save: {error}.") from error
        if tuple(saved.shape) != box[1]:
            raise UserError(f"{where} has shape {list(saved.shape)}, its metadata says {list(box[1])}.")
        return flat.as_strided(saved.shape, saved.stride, saved.offset)


def _slices(box: Box, of: Box) -> tuple[slice, ...]:
    """Where `box` is in the block `of`."""
    return tuple(slice(low - begin, low - begin + size) for low, size, begin in zip(box[0], box[1], of[0], strict=True))


def _intersection(a: Box, b: Box) -> Box | None:
    low = tuple(map(max, a[0], b[0]))
    high = tuple(min(x + n, y + m) for x, n, y, m in zip(*a, *b, strict=True))
    sizes = tuple(h - x for x, h in zip(low, high, strict=True))
    return (low, sizes) if all(size > 0 for size in sizes) else None


def _within(box: Box, other: Box) -> bool:
    return _intersection(box, other) == box


class _Window(io.RawIOBase):
    """Some bytes of a mapped file, as a file."""

    def __init__(self, whole: mmap.mmap, begin: int, length: int) -> None:
        self._whole, self._begin, self._length, self._at = whole, begin, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence] + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._at))
        begin = self._begin + self._at
        buffer[:count] = self._whole[begin : begin + count]
        self._at += count
        return count


class _MetadataUnpickler(pickle.Unpickler):
    """Reads what torch.distributed.checkpoint writes, and runs nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        ours = module.startswith("torch.distributed.checkpoint.") and name[:1] in "_ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        plain = {
            ("torch", "Size"): torch.Size,
            ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("pathlib", "PosixPath"): pathlib.PurePosixPath,
            ("pathlib", "Path"): pathlib.PurePosixPath,
            ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,
        }
        if (module, name) in plain:
            return plain[module, name]
        found = super().find_class(module, name) if ours or module == "torch" else None
        if (ours and isinstance(found, type)) or isinstance(found, torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


@dataclass(frozen=True)
class _SavedTensor:
    """What torch.save says of a tensor: its elements are in the archive's record data/{record}."""

    dtype: torch.dtype
    record: str
    elements: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _TensorUnpickler(pickle.Unpickler):
    """Reads a tensor that torch.save wrote, without its elements, and runs nothing."""

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, str, int]:
        _, dtype, record, _, elements = pid
        return dtype, str(record), int(elements)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _saved_tensor
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a float tensor does not need")


def _saved_tensor(
    storage: tuple[torch.dtype, str, int], offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> _SavedTensor:
    return _SavedTensor(*storage, offset, shape, stride)
