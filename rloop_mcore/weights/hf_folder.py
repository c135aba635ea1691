"""Hugging Face folders: read tensors slice by slice; write a folder that transformers, SGLang and vLLM open."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch

from rloop_mcore.errors import UserError
from rloop_mcore.platform.files import flushing, new_directory, read_json
from rloop_mcore.types import Policy
from rloop_mcore.weights.digest import combine
from rloop_mcore.weights.tensor_files import INDEX_FILE, SINGLE_FILE, catalogue

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
SHARD_BYTES = 4 << 30  # of a file
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
_MORE_TEMPLATES = "additional_chat_templates"  # a folder of the tokenizer's templates that have a name
CONFIG_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)

Plan = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # the tensors of a folder in order: dtype and shape


class TensorReader:
    """The tensors of an HF folder, mapped into memory: what is not touched is not read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries = catalogue(folder)
        self._maps: dict[Path, mmap.mmap] = {}
        for file in {entry.file for entry in self.entries.values()}:  # now: one that is replaced later has other places
            with file.open("rb") as stream:
                self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)

    def dtype(self, name: str) -> torch.dtype:
        return next(dtype for dtype, word in DTYPES.items() if word == self.entries[name].dtype)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor over the file's bytes, in a storage of its own. Writing to it does not change the file."""
        entry = self.entries[name]
        dtype = self.dtype(name)
        if not prod(entry.shape):
            return torch.empty(entry.shape, dtype=dtype)
        flat = torch.frombuffer(self._maps[entry.file], dtype=dtype, count=prod(entry.shape), offset=entry.begin)
        return flat.view(entry.shape)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in host memory, row-major."""
    return memoryview(tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy())


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether it holds neither NaN nor an infinity. It takes no memory."""
    return not tensor.numel() or all(math.isfinite(float(bound)) for bound in tensor.aminmax())


def check_finite(names: str, tensor: torch.Tensor, source: Path) -> None:
    """Raises UserError where a tensor of `source` holds NaN or an infinity: such a model says nothing."""
    if not is_finite(tensor):
        raise UserError(f"{source}: {names} holds NaN or infinity: the weights are damaged, get them anew.")


def _write_at(fd: int, data: memoryview, offset: int) -> None:
    while data:  # one call writes 2 GiB at most
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


class TensorWriter:
    """The safetensors of an HF folder, laid out from a plan and filled in any order, by several threads if need be."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        """Write the headers, and the index where there are several files."""
        self.plan = plan
        self.files = files_of(plan)
        self._missing = set(plan)
        self._places: dict[str, tuple[int, int]] = {}  # file descriptor and offset
        self._descriptors: list[int] = []
        self._open = ExitStack()
        for file_name, names in self.files.items():
            fd = os.open(folder / file_name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            self._descriptors.append(fd)
            self._open.callback(os.close, fd)
            header, offsets = _header(plan, names)
            _write_at(fd, memoryview(header), 0)
            self._places |= {name: (fd, len(header) + offset) for name, offset in offsets.items()}
        if len(self.files) > 1:
            sizes = [prod(shape) * dtype.itemsize for dtype, shape in plan.values()]
            weight_map = {name: file_name for file_name, names in self.files.items() for name in names}
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
            (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor to its place. Raises ValueError unless it is the plan's, and has not been written before."""
        if self.plan.get(name) != (tensor.dtype, tuple(tensor.shape)) or name not in self._missing:
            raise ValueError(f"{name}: {tensor.dtype} {list(tensor.shape)} is not in the plan, or the name came twice")
        self._missing.discard(name)
        fd, offset = self._places[name]
        _write_at(fd, bytes_of(tensor), offset)

    def __enter__(self) -> TensorWriter:
        self._open.enter_context(flushing(self._descriptors))
        return self

    def __exit__(self, *error: Any) -> None:
        """Raises ValueError where a tensor was not written."""
        self._open.__exit__(*error)
        if error[0] is None and self._missing:
            raise ValueError(f"{len(self._missing)} tensors were not written, e.g. {min(self._missing)}")


def write_folder(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    source: Path,
) -> Policy:
    """Write an HF folder atomically: the tensors as they stream by, config and tokenizer files copied from `source`.

    `shapes` are those of the tensors; all have one dtype. The same tensors give the same bytes. Raises ValueError
    unless exactly these tensors come.
    """
    stream = iter(tensors)
    first = next(stream)
    dtype = first[1].dtype
    written: dict[str, tuple[str, tuple[int, ...], str]] = {}
    plan = {name: (dtype, shape) for name, shape in shapes.items()}
    with new_directory(path) as folder:
        write_config(folder, source, {dtype})
        with TensorWriter(folder, plan) as writer:
            for name, tensor in chain([first], stream):
                writer.write(name, tensor)
                written[name] = (DTYPES[dtype], tuple(tensor.shape), hashlib.sha256(bytes_of(tensor)).hexdigest())
    return Policy(path, combine(written))


def write_config(folder: Path, source: Path, dtypes: set[torch.dtype]) -> None:
    """Copy config and tokenizer files. dtypes: of the tensors; where it is one, it is config.json's too."""
    for name in CONFIG_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for template in source.glob(f"{_MORE_TEMPLATES}/*.jinja"):
        (folder / _MORE_TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(template, folder / _MORE_TEMPLATES / template.name)
    config = read_json(source / "config.json")
    if len(dtypes) == 1:
        for key in [key for key in ("torch_dtype", "dtype") if key in config] or ["dtype"]:
            config[key] = str(*dtypes).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def files_of(plan: Plan) -> dict[str, list[str]]:
    """The names of the files, and of the tensors in each: at most SHARD_BYTES, or one tensor."""
    files: list[list[str]] = [[]]
    size = 0
    for name, (dtype, shape) in plan.items():
        of_tensor = prod(shape) * dtype.itemsize
        if files[-1] and size + of_tensor > SHARD_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += of_tensor
    if len(files) == 1:
        return {SINGLE_FILE: files[0]}
    count = len(files)
    return {f"model-{i + 1:05d}-of-{count:05d}.safetensors": names for i, names in enumerate(files)}


def _header(plan: Plan, names: Iterable[str]) -> tuple[bytes, dict[str, int]]:
    """The head of a safetensors file, and where each tensor begins after it. Wide types first: each is aligned."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name in sorted(names, key=lambda name: -plan[name][0].itemsize):
        dtype, shape = plan[name]
        offsets[name], end = end, end + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offsets[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets
