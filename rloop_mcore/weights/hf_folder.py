"""Hugging Face folders: read tensors lazily, slice by slice; write a folder that transformers and SGLang open."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rloop_mcore.errors import UserError
from rloop_mcore.platform.files import atomic_path
from rloop_mcore.types import Policy
from rloop_mcore.weights.digest import combine
from rloop_mcore.weights.tensor_files import INDEX_FILE, SINGLE_FILE, catalogue, read_json

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


class TensorReader:
    """The tensors of an HF folder, read lazily and slice by slice."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries = catalogue(folder)
        self._open_files: dict[Path, Any] = {}

    def check(self, expected: Mapping[str, tuple[int, ...]], ignored: Iterable[str] = ()) -> None:
        """Raise UserError unless exactly the tensors `expected` (name -> shape) are here, as floating-point numbers.

        Tensors whose name ends with one of `ignored` may be here too.
        """
        for name, shape in expected.items():
            entry = self.entries.get(name)
            if entry is None:
                raise UserError(f"{self.folder} lacks tensor {name} {list(shape)}, which its config.json calls for.")
            if entry.shape != shape:
                raise UserError(
                    f"{entry.file}: tensor {name} has shape {list(entry.shape)}, config.json calls for {list(shape)}."
                )
            if entry.dtype not in _DTYPES.values():
                raise UserError(f"{entry.file}: tensor {name} is {entry.dtype}; it has to be F32, BF16 or F16.")
        suffixes = tuple(ignored)
        for name in sorted(self.entries.keys() - expected.keys()):
            if not name.endswith(suffixes):
                raise UserError(f"{self.entries[name].file} holds tensor {name}, which this family does not know.")

    def tensor(self, name: str) -> Any:
        """A tensor to slice; a slice is read from the file when it is taken."""
        file = self.entries[name].file
        if file not in self._open_files:
            self._open_files[file] = safe_open(file, framework="pt")
        return self._open_files[file].get_slice(name)


def write_folder(
    path: Path, tensors: Iterable[tuple[str, torch.Tensor]], source: Path, shard_bytes: int = 4 << 30
) -> Policy:
    """Write an HF folder atomically: the tensors as they stream by, config and tokenizer files copied from `source`.

    At most `shard_bytes` of tensors (or one tensor) are held in memory and go to a file. The same tensors give the
    same bytes. All tensors have one dtype, which becomes config.json's.
    """
    with atomic_path(path) as folder:
        folder.mkdir()
        writer = _ShardWriter(folder, shard_bytes)
        for name, tensor in tensors:
            writer.add(name, tensor)
        writer.finish()
        for name in _COPIED:
            if (source / name).exists():
                shutil.copyfile(source / name, folder / name)
        config = read_json(source / "config.json")
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(writer.dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return Policy(path, combine(writer.written))


class _ShardWriter:
    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder = folder
        self.shard_bytes = shard_bytes
        self.written: dict[str, tuple[str, tuple[int, ...], str]] = {}
        self.dtype: torch.dtype | None = None
        self._shard: dict[str, torch.Tensor] = {}
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        tensor = tensor.detach().to("cpu", copy=True).contiguous()  # a copy: parameters may share one DDP buffer
        self.dtype = self.dtype or tensor.dtype
        if tensor.dtype != self.dtype or name in self.written:
            raise ValueError(f"{name}: {tensor.dtype} after {self.dtype}, or the name came twice")
        if self._shard and sum(t.nbytes for t in self._shard.values()) + tensor.nbytes > self.shard_bytes:
            self._flush()
        sha256 = hashlib.sha256(tensor.flatten().view(torch.uint8).numpy()).hexdigest()
        self.written[name] = (_DTYPES[tensor.dtype], tuple(tensor.shape), sha256)
        self._shard[name] = tensor
        self._total_bytes += tensor.nbytes

    def _flush(self) -> None:
        save_file(self._shard, self.folder / f"shard-{len(self._shards)}", metadata={"format": "pt"})
        self._shards.append(list(self._shard))
        self._shard = {}

    def finish(self) -> None:
        """Write what is left and give the shards their names, which say how many there are."""
        self._flush()
        if len(self._shards) == 1:
            (self.folder / "shard-0").rename(self.folder / SINGLE_FILE)
            return
        weight_map = {}
        for i, names in enumerate(self._shards):
            file_name = f"model-{i + 1:05d}-of-{len(self._shards):05d}.safetensors"
            (self.folder / f"shard-{i}").rename(self.folder / file_name)
            weight_map.update(dict.fromkeys(names, file_name))
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
