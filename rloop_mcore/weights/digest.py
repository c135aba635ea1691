"""The digest of a policy: one sha256 that two folders share when their weights are bit-identical. Imports no torch.

It covers, for the HF-named tensors sorted by name, the name, dtype, shape and sha256 of the bytes. So it can
be computed while tensors stream by in any order, and does not depend on how they are spread over files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from rloop_mcore.errors import UserError
from rloop_mcore.weights.tensor_files import TensorEntry, catalogue

_CHUNK_BYTES = 1 << 24


def digest_of(folder: Path) -> str:
    """The digest (hex) of the weights of an HF folder. Raises UserError for a folder without whole safetensors."""
    return combine({n: (e.dtype, e.shape, _sha256_of(e)) for n, e in catalogue(folder).items()})


def combine(tensors: Mapping[str, tuple[str, tuple[int, ...], str]]) -> str:
    """The digest (hex) of tensors given as name -> (dtype in safetensors' words, shape, sha256 hex of the bytes)."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        dtype, shape, sha256 = tensors[name]
        total.update(json.dumps([name, dtype, list(shape), sha256]).encode() + b"\n")
    return total.hexdigest()


def _sha256_of(entry: TensorEntry) -> str:
    sha256 = hashlib.sha256()
    with entry.file.open("rb") as stream:
        stream.seek(entry.begin)
        left = entry.end - entry.begin
        while left:
            chunk = stream.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise UserError(f"{entry.file} became shorter while it was read.")
            sha256.update(chunk)
            left -= len(chunk)
    return sha256.hexdigest()
