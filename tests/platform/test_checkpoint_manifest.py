"""A checkpoint's files with tensors are compared with their checksums, each by one of the ranks that read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rloop_mcore.errors import UserError
from rloop_mcore.platform.manifest import check_manifest, crc32_of, write_manifest

TENSORS = ("a.distcp", "b.distcp", "c.distcp")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    for name in (".metadata", "common.pt", "metadata.json", *TENSORS):
        (tmp_path / name).write_bytes(name.encode() * 9)
    write_manifest(tmp_path, {name: crc32_of(tmp_path / name) for name in TENSORS})
    return tmp_path


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", TENSORS)
def test_each_file_of_tensors_is_read_by_one_rank(checkpoint: Path, name: str, ranks: int) -> None:
    shares = [(rank, ranks) for rank in range(ranks)]
    for share in (None, *shares):
        check_manifest(checkpoint, trust=False, share=share)
    (checkpoint / name).write_bytes(b"x" * (checkpoint / name).stat().st_size)
    check_manifest(checkpoint, trust=False)
    refused = []
    for share in shares:
        try:
            check_manifest(checkpoint, trust=False, share=share)
        except UserError as error:
            refused.append(str(error))
    assert len(refused) == 1
    assert f"{name} has another content than was written" in refused[0]
