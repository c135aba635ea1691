"""Folders of safetensors: written whole or sharded, read by slice, digested without torch, refused when broken."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rloop_mcore.errors import UserError
from rloop_mcore.weights import hf_folder
from rloop_mcore.weights.digest import combine, digest_of
from rloop_mcore.weights.hf_folder import TensorReader, TensorWriter, write_folder
from rloop_mcore.weights.tensor_files import catalogue, check_tensors

TENSORS = {
    "b": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "a": torch.linspace(-1, 1, 5),
    "c": torch.ones(2, 2, 2),
}
SHAPES = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "x", "torch_dtype": "bfloat16"}')
    (folder / "tokenizer.json").write_text("tokens")
    (folder / "generation_config.json").write_text("{}")
    (folder / "private.txt").write_text("not the model's")
    return folder


def test_one_file(source: Path, tmp_path: Path) -> None:
    policy = write_folder(tmp_path / "out", SHAPES, iter(TENSORS.items()), source)
    names = {path.name for path in policy.path.iterdir()}
    assert names == {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json"}
    for name, tensor in load_file(policy.path / "model.safetensors").items():
        assert torch.equal(tensor, TENSORS[name])
    assert json.loads((policy.path / "config.json").read_text()) == {"model_type": "x", "torch_dtype": "float32"}
    assert policy.digest == digest_of(policy.path)
    with safe_open(policy.path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers asks for it


def test_every_tensor_is_aligned(tmp_path: Path) -> None:
    plan = {"a": (torch.bfloat16, (3,)), "b": (torch.float32, (2,)), "cc": (torch.float16, (1, 1))}
    with TensorWriter(tmp_path, plan) as writer:
        for name, (dtype, shape) in plan.items():
            writer.write(name, torch.ones(shape, dtype=dtype))
    entries = catalogue(tmp_path)
    assert min(entry.begin for entry in entries.values()) % 8 == 0
    assert all(entries[name].begin % dtype.itemsize == 0 for name, (dtype, _) in plan.items())


def test_a_file_that_takes_a_few_bytes_at_a_time(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system does above 2 GiB."""
    whole = write_folder(tmp_path / "whole", SHAPES, iter(TENSORS.items()), source)
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:7], offset))
    parts = write_folder(tmp_path / "parts", SHAPES, iter(TENSORS.items()), source)
    files = [policy.path / "model.safetensors" for policy in (whole, parts)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_tensors_go_to_the_disk_while_others_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what the disk says against it is told: an fsync that follows may not say it once more."""
    fdatasync, flushed = os.fdatasync, threading.Event()

    def on_a_bad_disk(fd: int) -> None:
        fdatasync(fd)
        assert os.fstat(fd).st_ino == (tmp_path / "model.safetensors").stat().st_ino
        flushed.set()
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", on_a_bad_disk)
    plan = {name: (torch.float32, shape) for name, shape in SHAPES.items()}

    def write() -> None:
        with TensorWriter(tmp_path, plan) as writer:
            for name, tensor in TENSORS.items():
                writer.write(name, tensor)
                assert flushed.wait(60)

    with pytest.raises(OSError, match="Input/output"):
        write()


def test_both_names_of_the_dtype_are_kept_up(source: Path, tmp_path: Path) -> None:
    """transformers 5 believes `dtype`, older ones `torch_dtype`."""
    (source / "config.json").write_text('{"torch_dtype": "bfloat16", "dtype": "bfloat16"}')
    policy = write_folder(tmp_path / "out", SHAPES, iter(TENSORS.items()), source)
    assert json.loads((policy.path / "config.json").read_text()) == {"torch_dtype": "float32", "dtype": "float32"}


def test_shards_hold_the_same_policy(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write_folder(tmp_path / "whole", SHAPES, iter(TENSORS.items()), source)
    again = write_folder(tmp_path / "again", SHAPES, iter(TENSORS.items()), source)
    monkeypatch.setattr(hf_folder, "SHARD_BYTES", 60)
    reordered = write_folder(tmp_path / "sharded", dict(sorted(SHAPES.items())), iter(sorted(TENSORS.items())), source)
    files = [path.name for path in sorted(reordered.path.glob("*.safetensors"))]
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((reordered.path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    assert whole.digest == again.digest == reordered.digest == digest_of(reordered.path)
    assert (whole.path / "model.safetensors").read_bytes() == (again.path / "model.safetensors").read_bytes()
    reader = TensorReader(reordered.path)
    shapes = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    check_tensors(reordered.path, reader.entries, shapes)
    assert torch.equal(reader.tensor("b")[1:2], TENSORS["b"][1:2])
    assert torch.equal(reader.tensor("b")[:, 1:3], TENSORS["b"][:, 1:3])
    assert reader.tensor("b")[3:3].shape == (0, 4)  # a rank whose vocabulary rows are all padding


def test_digest_is_what_it_says(source: Path, tmp_path: Path) -> None:
    policy = write_folder(tmp_path / "out", SHAPES, iter(TENSORS.items()), source)
    total = hashlib.sha256()
    for name in ("a", "b", "c"):
        array = TENSORS[name].numpy()
        total.update(
            json.dumps([name, "F32", list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]).encode() + b"\n"
        )
    assert policy.digest == total.hexdigest()


@pytest.mark.parametrize("other", [("x", (4,), "00"), ("F32", (2, 2), "00"), ("F32", (4,), "01")])
def test_digest_sees_dtype_shape_and_bytes(other: tuple) -> None:
    assert combine({"t": ("F32", (4,), "00")}) != combine({"t": other})


def test_digest_needs_no_torch() -> None:
    code = "import sys, rloop_mcore.weights.digest; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("stream", "sentence"),
    [
        ([("a", TENSORS["a"]), ("a", TENSORS["a"])], "the name came twice"),
        ([("a", TENSORS["a"]), ("c", TENSORS["c"])], "1 tensors were not written, e.g. b"),
        ([("a", TENSORS["a"][:2])], "not in the plan"),
        ([*TENSORS.items(), ("d", TENSORS["a"])], "not in the plan"),
    ],
)
def test_a_failed_write_leaves_nothing(
    source: Path, tmp_path: Path, stream: list[tuple[str, torch.Tensor]], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        write_folder(tmp_path / "out", SHAPES, stream, source)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def broken(folder: Path, how: str) -> None:
    file = folder / "model.safetensors"
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "more":
        file.write_bytes(file.read_bytes() + b"!")
    elif how == "backwards":
        entry = {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [4, 0]}
        text = json.dumps({"a": entry | {"data_offsets": [0, 4]}, "b": entry}).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    elif how == "no header":
        file.write_bytes(b"abc")
    elif how == "not json":
        file.write_bytes((4).to_bytes(8, "little") + b"oops")
    elif how == "bin":
        file.rename(folder / "pytorch_model.bin")
    elif how == "nothing":
        file.unlink()
    elif how == "missing shard":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-9.safetensors"}}')
    elif how == "wrong shard":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"zzz": "model.safetensors"}}')
    elif how == "outside":
        places = {"a": "model.safetensors", "b": "../model.safetensors", "c": "model.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    elif how == "twice":
        save_file({"a": TENSORS["a"]}, folder / "other.safetensors")
        places = dict.fromkeys(TENSORS, "model.safetensors")
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": places | {"a": "other.safetensors"}})
        )
    elif how == "unnamed":
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": ""}}')
    elif how == "bad index":
        (folder / "model.safetensors.index.json").write_text("{")


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("cut", r"model\.safetensors is cut off"),
        ("more", r"model\.safetensors has \d+ bytes, and its tensors end at \d+\.$"),
        ("backwards", r"model\.safetensors has \d+ bytes, and its tensors end at \d+\.$"),
        ("no header", "is not a whole safetensors file"),
        ("not json", "its header is unreadable"),
        ("bin", r"\.bin files, which are pickles"),
        ("nothing", r"has neither model\.safetensors nor"),
        ("missing shard", r"names model-9\.safetensors, which is not in the folder"),
        ("wrong shard", "places tensor zzz in model.safetensors, which does not hold it"),
        ("outside", "weight_map has to name files of its own folder"),
        ("twice", r"does not place tensor a, which model\.safetensors holds"),
        ("unnamed", "weight_map has to name files of its own folder"),
        ("bad index", r"index\.json is no JSON object"),
    ],
)
def test_broken_folders(tmp_path: Path, how: str, sentence: str) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    broken(tmp_path, how)
    with pytest.raises(UserError, match=sentence):
        TensorReader(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"a": TENSORS["a"]}, r"lacks tensor b \[3, 4\]"),
        (TENSORS | {"b": torch.zeros(4, 3)}, r"tensor b has shape \[4, 3\], config\.json calls for \[3, 4\]"),
        (TENSORS | {"b": torch.zeros(3, 4, dtype=torch.int8)}, "tensor b is I8"),
        (TENSORS | {"d": torch.zeros(1)}, "holds tensor d, which this family does not know"),
    ],
)
def test_wrong_tensors(tmp_path: Path, tensors: dict[str, torch.Tensor], sentence: str) -> None:
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=sentence):
        check_tensors(tmp_path, catalogue(tmp_path), {"b": (3, 4)}, ignored=["a", "c"])
