"""What the files of a checkpoint are: some are pickles, which run what they say, so they are checked before loading."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path

from rloop_mcore.errors import UserError
from rloop_mcore.platform.files import parse_json

_MANIFEST = "manifest.json"
_PICKLES = (".metadata", "common.pt")  # of Megatron's torch_dist
_BLOCK = 4 * 2**20  # bytes


def write_manifest(folder: Path, crc32: Mapping[str, int]) -> None:
    """Say what the files of a checkpoint are, so that `check_manifest` finds what was changed or is missing.

    crc32: checksums of files with tensors, which are too large to be read again here; the others have sizes alone.
    """
    files = {
        path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file() and path.name != _MANIFEST
    }
    sha256 = {name: _sha256(folder / name) for name in _PICKLES if name in files}
    text = json.dumps(
        {"format": "rloop checkpoint 1", "files": files, "sha256": sha256, "crc32": dict(crc32)}, indent=2
    )
    (folder / _MANIFEST).write_text(text + "\n", encoding="utf-8")


def check_manifest(folder: Path, trust: bool, share: tuple[int, int] | None = None) -> None:
    """Raises UserError unless the checkpoint is as it was written; `trust`: one without our manifest will do.

    share: (rank, ranks), which of so many shares of the files with tensors are read, too, and compared with their
    checksums; None: none is.
    """
    file = folder / _MANIFEST
    if not file.exists() and trust:
        return
    if not file.exists():
        raise UserError(
            f"{folder} has no {_MANIFEST}: rloop did not write it, so nothing says what its .metadata, a pickle, "
            "should hold (`rloop convert --trust` takes it all the same)."
        )
    try:
        manifest = parse_json(file.read_text(encoding="utf-8"))
        files, digests = dict(manifest["files"]), dict(manifest["sha256"])
        checksums = sorted(dict(manifest.get("crc32", {})).items())  # manifests had none before
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no manifest of a checkpoint ({type(error).__name__}: {error}).") from error
    for name, size in files.items():
        found = (folder / name).stat().st_size if (folder / name).exists() else None
        if found is None:
            raise UserError(f"{folder} lacks {name}, which its {_MANIFEST} lists.")
        if found != size:
            raise UserError(
                f"{folder / name} has {found} bytes, and {size} in {_MANIFEST}: it is not what was written."
            )
    for name in _PICKLES:
        if (folder / name).exists() and _sha256(folder / name) != digests.get(name):
            raise UserError(f"{folder / name} is not the file that {_MANIFEST} has the digest of.")
    for name, checksum in checksums[share[0] :: share[1]] if share is not None else []:
        if crc32_of(folder / name) != checksum:
            raise UserError(
                f"{folder / name} has another content than was written (its crc32 is wrong): restore it, or remove "
                f"{folder}, and the next start says how to go on without."
            )


def crc32_of(path: Path) -> int:
    """Of a file. It reads some GB a second, twice what a digest does, and finds what a disk does to a file."""
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
