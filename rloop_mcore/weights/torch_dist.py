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
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, combinations
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
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
from rloop_mcore.platform.files import read_json
from rloop_mcore.platform.manifest import check_manifest, write_manifest
from rloop_mcore.platform.unpickling import TORCH_DTYPES, ListedUnpickler, member_of
from rloop_mcore.weights.hf_folder import DTYPES, bytes_of

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
        self.boxes: dict[str, list[Box]] = {}  # the blocks of each tensor
        self.stored: dict[MetadataIndex, _StorageInfo] = {}

    def add(self, key: str, box: Box, tensor: torch.Tensor) -> None:
        """A block of the tensor `key`; `tensor` has its elements, in row-major order, whatever its shape."""
        # torch.save writes whole storages: this tensor's has its elements and nothing else
        own = torch.frombuffer(bytes_of(tensor), dtype=tensor.dtype).view(box[1])
        self._save(own, MetadataIndex(key, torch.Size(box[0])))
        self.boxes.setdefault(key, []).append(box)

    def add_nothing(self, key: str) -> None:
        """An object that is None, in the list that Megatron puts around objects."""
        self._save([None], MetadataIndex(key))

    def _save(self, value: Any, index: MetadataIndex) -> None:
        begin = self._file.tell()
        try:
            torch.save(value, self._file)
        except RuntimeError as error:  # torch's writer ends the archive on the way out, and complains of that
            raise error.__context__ or error from None
        self.stored[index] = _StorageInfo(self.name, begin, self._file.tell() - begin)

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
        for key, boxes in file.boxes.items():
            chunks[key] += [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes]
    entries: dict[str, Any] = {
        key: TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), sorted(chunks[key], key=_offsets))
        for key, (dtype, shape) in tensors.items()
    }
    entries |= {index.fqn: BytesStorageMetadata() for index in stored if index.fqn not in tensors}
    (folder / _METADATA).write_bytes(pickle.dumps(Metadata(entries, storage_data=stored)))
    common = io.BytesIO()
    torch.save({"checkpoint_version": 3.0, "iteration": 0}, common)
    (folder / _COMMON).write_bytes(common.getvalue())  # torch's own writer has no word for a full disk
    (folder / _BACKEND).write_text(json.dumps(_NAMES), encoding="utf-8")
    write_manifest(folder, crc32={})


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
    def _stacked(self) -> int:
        """How many dimensions, from the first on, all blocks have one element in: layers, and a layer's experts."""
        rank = len(self.shape)
        return next((d for d in range(rank) if any(sizes[d] != 1 for _, sizes in self.boxes)), rank)

    @cached_property
    def _by_stack(self) -> dict[tuple[int, ...], list[Box]]:
        found: dict[tuple[int, ...], list[Box]] = {}
        for box in self.boxes:
            found.setdefault(box[0][: self._stacked], []).append(box)
        return found

    def near(self, box: Box) -> list[Box]:
        """The blocks that may have something in common with `box`: those of its layer and expert."""
        if any(size != 1 for size in box[1][: self._stacked]):
            return self.boxes
        return self._by_stack.get(box[0][: self._stacked], [])

    def overlaps(self) -> bool:
        """Whether two blocks have an element in common."""
        pairs = chain.from_iterable(combinations(boxes, 2) for boxes in self._by_stack.values())
        return any(_intersection(*pair) for pair in pairs)


class BlockReader:
    """The tensors of a checkpoint, mapped into memory: what is not touched is not read."""

    def __init__(self, folder: Path, trust: bool = False, checksums: bool = True) -> None:
        """Raises UserError unless it is a whole checkpoint, of ours or (`trust`) of somebody else's.

        checksums: whether each block that is read has to have the crc32 that torch.save gave it, over 4 GB/s a thread;
        not where the reader compares what was just written with where it came from.
        """
        self.folder, self._checksums = folder, checksums
        self._sound: set[tuple[str, int]] = set()  # blocks that have theirs: file and offset
        if not (folder / _METADATA).is_file() or read_json(folder / _BACKEND).get("sharded_backend") != "torch_dist":
            raise UserError(f"{folder} is no Megatron checkpoint of format torch_dist ({_METADATA}, {_BACKEND}).")
        check_manifest(folder, trust)
        try:
            with (folder / _METADATA).open("rb") as file:
                found = ListedUnpickler(file, _OF_METADATA).load()
            self._stored = {
                index: _StorageInfo(str(info.relative_path), int(info.offset), int(info.length))
                for index, info in dict(found.storage_data).items()
            }
            self.tensors = {
                str(key): StoredTensor(
                    entry.properties.dtype,
                    tuple(map(int, entry.size)),
                    [(tuple(map(int, chunk.offsets)), tuple(map(int, chunk.sizes))) for chunk in entry.chunks],
                )
                for key, entry in found.state_dict_metadata.items()
                if isinstance(entry, TensorStorageMetadata)
            }
            names = {info.relative_path for info in self._stored.values()}
        except Exception as error:  # a pickle that is damaged, or none of a checkpoint, fails in every way there is
            raise UserError(f"{folder / _METADATA} cannot be read: {type(error).__name__}: {error}.") from error
        self._maps = {name: self._open(name) for name in names}

    def check(self, key: str) -> None:
        """Raises UserError unless the blocks of tensor `key` are whole, and make up the whole tensor."""
        stored, where = self.tensors[key], f"{self.folder}: tensor {key}"
        if stored.dtype not in list(DTYPES):  # whatever a pickle has put there
            raise UserError(f"{where} is {stored.dtype}; it has to be float32, bfloat16 or float16.")
        for offsets, sizes in stored.boxes:
            fits = len(offsets) == len(sizes) == len(stored.shape) and all(
                low >= 0 and size >= 1 and low + size <= whole
                for low, size, whole in zip(offsets, sizes, stored.shape, strict=True)
            )
            if not fits:
                raise UserError(f"{where} {list(stored.shape)} has a block {list(sizes)} at {list(offsets)}.")
            info = self._stored.get(MetadataIndex(key, torch.Size(offsets)))
            if info is None or not 0 <= info.offset <= info.offset + info.length <= len(self._maps[info.relative_path]):
                raise UserError(f"{where}: its block at {list(offsets)} is in no file, or the file is cut off.")
        there = sum(prod(sizes) for _, sizes in stored.boxes)
        if there != prod(stored.shape):
            raise UserError(f"{where}: its blocks have {there} elements, and it has {prod(stored.shape)}.")
        if stored.overlaps():
            raise UserError(f"{where}: two of its blocks overlap, so elements of it are in none.")

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

        Raises UserError where no block holds a part of it, or one that does has another content than was written.
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
            saved: _SavedTensor = _TensorUnpickler(io.BytesIO(text), _OF_TENSORS).load()
            record = records[f"data/{saved.record}"]
            head = info.offset + record.header_offset
            name_length, extra_length = (int.from_bytes(whole[head + i : head + i + 2], "little") for i in (26, 28))
            begin, size = head + 30 + name_length + extra_length, saved.elements * saved.dtype.itemsize
            if record.compress_type != zipfile.ZIP_STORED or begin + size > info.offset + info.length:
                raise ValueError("its elements are compressed, or not all there")
            flat = torch.frombuffer(whole, dtype=saved.dtype, count=saved.elements, offset=begin)
            tensor = flat.as_strided(saved.shape, saved.stride, saved.offset)
        except Exception as error:  # as above
            raise UserError(f"{where} is no tensor of torch.save: {type(error).__name__}: {error}.") from error
        if self._checksums and (info.relative_path, info.offset) not in self._sound:
            if zlib.crc32(memoryview(whole)[begin : begin + record.file_size]) != record.CRC:
                raise UserError(
                    f"{where}, has another content than was written (its crc32 is wrong): restore the file, or convert "
                    "another checkpoint."
                )
            self._sound.add((info.relative_path, info.offset))
        if tuple(saved.shape) != box[1] or saved.dtype != self.tensors[key].dtype:
            raise UserError(
                f"{where} is {saved.dtype} {list(saved.shape)}, its metadata says {self.tensors[key].dtype} "
                f"{list(box[1])}."
            )
        return tensor


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


_CHECKPOINT = "torch.distributed.checkpoint"
_OF_METADATA: dict[tuple[str, str], Any] = TORCH_DTYPES | {
    ("builtins", "getattr"): member_of,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,
    **{(f"{_CHECKPOINT}.metadata", name): getattr(metadata, name) for name in metadata.__all__},
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"): metadata._MEM_FORMAT_ENCODING,
    **{(f"{_CHECKPOINT}.filesystem", name): getattr(filesystem, name) for name in ("_StorageInfo", "_StoragePrefix")},
    **{
        (f"{_CHECKPOINT}.planner", name): getattr(planner, name)
        for name in ("SavePlan", "WriteItem", "WriteItemType", "BytesIOWriteData", "TensorWriteData")
    },
}


@dataclass(frozen=True)
class _SavedTensor:
    """What torch.save says of a tensor: its elements are in the archive's record data/{record}."""

    dtype: torch.dtype
    record: str
    elements: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _TensorUnpickler(ListedUnpickler):
    """Reads a tensor that torch.save wrote, without its elements."""

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, str, int]:
        _, dtype, record, _, elements = pid
        return dtype, str(record), int(elements)


def _saved_tensor(
    storage: tuple[torch.dtype, str, int], offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> _SavedTensor:
    return _SavedTensor(*storage, offset, shape, stride)


_OF_TENSORS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _saved_tensor,
    ("collections", "OrderedDict"): collections.OrderedDict,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}
