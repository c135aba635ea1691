"""What the tests of `rloop convert` do to folders and checkpoints, and what a refusal is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rloop_mcore.main.cli import main


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def flip_a_bit(folder: Path, source: Path) -> None:
    """In the last element of a tensor."""
    own = load_file(source / "model.safetensors")["model.layers.2.mlp.up_proj.weight"].numpy().tobytes()
    (file,) = (file for file in folder.glob("*.distcp") if own in file.read_bytes())
    content = bytearray(file.read_bytes())
    content[content.find(own) + len(own) - 4] ^= 1
    file.write_bytes(content)


def refused(arguments: list[object], sentence: str, target: Path, capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    before = sorted(target.parent.iterdir())
    assert main(["convert", *map(str, arguments)]) == 2
    said = capsys.readouterr().err.strip()
    assert sentence in said
    assert len(said.splitlines()) == 1
    assert sorted(target.parent.iterdir()) == before  # nothing written
