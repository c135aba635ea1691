"""`rloop convert` of what cannot be converted: one sentence, exit code 2, nothing written."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conversions import edit_tensors, flip_a_bit, refused
from safetensors.torch import load_file
from torch.distributed.checkpoint import filesystem

from rloop_mcore.errors import UserError
from rloop_mcore.main.cli import main
from rloop_mcore.platform.manifest import write_manifest
from rloop_mcore.weights import hf_folder
from rloop_mcore.weights.hf_folder import TensorWriter
from rloop_mcore.weights.torch_dist import BlockFile, BlockReader, finish


def edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def in_bf16(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {name: tensors[name].bfloat16()}


def in_two_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    plan = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    (folder / "model.safetensors").unlink()
    most = sum(tensor.nbytes for tensor in tensors.values()) * 2 // 3
    with patch.object(hf_folder, "SHARD_BYTES", most), TensorWriter(folder, plan) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def edit_header(folder: Path, name: str, change: Callable[[dict], object]) -> None:
    """Change what the header says of a tensor, and nothing else."""
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header[name])
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def with_unnamed_tensor(folder: Path) -> None:
    in_two_shards(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def without_second_shard(folder: Path) -> None:
    in_two_shards(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def with_third_shard(folder: Path) -> None:
    in_two_shards(folder)
    shutil.copy(folder / "model-00002-of-00002.safetensors", folder / "model-00003-of-00003.safetensors")


def with_the_whole_beside(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    in_two_shards(folder)
    (folder / "model.safetensors").write_bytes(whole)


def with_a_shard_beside(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")


def truncated(folder: Path) -> None:
    in_two_shards(folder)
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


MALFORMED_FOLDERS = {
    "bytes of another tensor": (
        lambda f: edit_header(f, "model.norm.weight", lambda e: e.update(data_offsets=[0, 128])),
        "it should begin at",
    ),
    "too few bytes": (
        lambda f: edit_header(f, "model.norm.weight", lambda e: e.update(shape=[64])),
        "model.norm.weight F32 [64] is at bytes",
    ),
    "another size of the elements": (
        lambda f: edit_header(f, "model.norm.weight", lambda e: e.update(dtype="BF16")),
        "model.norm.weight BF16 [32] is at bytes",
    ),
    "a shape of fractions": (
        lambda f: edit_header(f, "model.norm.weight", lambda e: e.update(shape=[32.5])),
        "32.5 is no size",
    ),
    "a tensor that the index does not name": (with_unnamed_tensor, "does not place tensor model.norm.weight"),
    "no layers": (lambda f: edit_config(f, num_hidden_layers=0), "num_hidden_layers is 0; it has to be a whole number"),
    "a word for a number": (lambda f: edit_config(f, vocab_size="61"), "vocab_size is '61'"),
    "a word for a flag": (
        lambda f: edit_config(f, tie_word_embeddings="false"),
        "tie_word_embeddings is 'false'; it has to be true or false",
    ),
    "heads that don't share": (
        lambda f: edit_config(f, num_key_value_heads=3),
        "num_key_value_heads 3 does not divide num_attention_heads 4",
    ),
    "tied by the config, not by the tensors": (
        lambda f: edit_config(f, tie_word_embeddings=True),
        "ties lm_head.weight to model.embed_tokens.weight, and",
    ),
    "tied to integers": (
        lambda f: (
            edit_config(f, tie_word_embeddings=True),
            edit_tensors(f, lambda t: t.update({"lm_head.weight": torch.zeros(61, 32, dtype=torch.int8)})),
        ),
        "ties lm_head.weight to model.embed_tokens.weight, and",
    ),
    "another size in the config": (
        lambda f: edit_config(f, intermediate_size=48),
        r"gate_proj.weight has shape [40, 32], config.json calls for [48, 32]",
    ),
    "fewer layers in the config": (
        lambda f: edit_config(f, num_hidden_layers=3, layer_types=None),
        "holds tensor model.layers.3.",
    ),
    "a tensor missing": (
        lambda f: edit_tensors(f, lambda t: t.pop("model.norm.weight")),
        "lacks tensor model.norm.weight [32]",
    ),
    "a tensor too many": (
        lambda f: edit_tensors(f, lambda t: t.update(extra=torch.zeros(2))),
        "holds tensor extra, which this family does not know",
    ),
    "integers": (
        lambda f: edit_tensors(f, lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int8)})),
        "tensor model.norm.weight is I8",
    ),
    "a layer in another dtype": (
        lambda f: edit_tensors(f, lambda t: t.update(in_bf16(t, "model.layers.2.mlp.down_proj.weight"))),
        "the tensors of decoder.layers.mlp.linear_fc2.weight differ in dtype: give --dtype",
    ),
    "a value projection in another dtype": (
        lambda f: edit_tensors(f, lambda t: t.update(in_bf16(t, "model.layers.2.self_attn.v_proj.weight"))),
        "model.layers.2.self_attn.v_proj.weight differ in dtype, and become one: give --dtype",
    ),
    "a shard missing": (without_second_shard, "names model-00002-of-00002.safetensors, which is not in the folder"),
    "a shard too many": (with_third_shard, "does not name model-00003-of-00003.safetensors"),
    "shards and the whole": (with_the_whole_beside, "does not name model.safetensors, which is in the folder"),
    "the whole and a shard": (with_a_shard_beside, "has model.safetensors and model-00001-of-00002.safetensors"),
    "a shard cut off": (truncated, "model-00002-of-00002.safetensors is cut off"),
    "another architecture": (
        lambda f: edit_config(f, architectures=["GPT2LMHeadModel"]),
        "architectures is ['GPT2LMHeadModel']; supported are Qwen2ForCausalLM",
    ),
    "a kind of model that is not its architecture's": (
        lambda f: edit_config(f, model_type="llama"),
        "model_type is 'llama', and architectures is of qwen2",
    ),
    "an activation that is not supported": (lambda f: edit_config(f, hidden_act="gelu"), "hidden_act is 'gelu'"),
    "pickles": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        "has its weights in .bin files, which are pickles",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "has neither config.json nor metadata.json"),
    "a config that is not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is no JSON object"),
}


@pytest.mark.parametrize("how", MALFORMED_FOLDERS)
def test_a_malformed_folder_is_one_sentence(
    source: Path, tmp_path: Path, how: str, capsys: pytest.CaptureFixture
) -> None:
    damage, sentence = MALFORMED_FOLDERS[how]
    damage(source)
    refused([source, tmp_path / "mcore"], sentence, tmp_path / "mcore", capsys)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--tp", "3"], "--tp 3 does not divide"),
        (["--tp", "8"], "--tp 8 does not divide the 4 attention heads"),
        (["--pp", "3"], "--pp 3 does not divide the 4 layers"),
        (["--ep", "2"], "--ep 2 is for a model with experts"),
        (["--tp", "0"], "--tp 0: it is at least 1"),
        (["--threads", "-1"], "--threads -1"),
        (["--family", "lama"], "model.family is 'lama'"),
        (["--family", "llama"], "model.family is 'llama', and"),
        (["--trust"], "--config and --trust are for conversions to a Hugging Face folder"),
        (["--config", "."], "--config and --trust are for conversions to a Hugging Face folder"),
    ],
)
def test_an_impossible_option_is_one_sentence(
    source: Path, tmp_path: Path, options: list[str], sentence: str, capsys: pytest.CaptureFixture
) -> None:
    refused([source, tmp_path / "mcore", *options], sentence, tmp_path / "mcore", capsys)


def test_a_layout_is_no_option_for_a_folder(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["convert", str(source), str(tmp_path / "mcore")]) == 0
    refused([tmp_path / "mcore", tmp_path / "back", "--tp", "2"], "a folder has no layout", tmp_path / "back", capsys)


def test_a_target_without_room_is_one_sentence(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused([source, tmp_path / ("x" * 201)], "its name is longer than 200 bytes", tmp_path / "x", capsys)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    refused([source, tmp_path / "mcore"], "128.4 kB are to be written, and 100.0 kB are free", tmp_path / "x", capsys)


def test_nothing_is_overwritten(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "mcore").mkdir()
    refused([source, tmp_path / "mcore"], "exists already", tmp_path / "mcore", capsys)


class Evil:
    def __reduce__(self) -> tuple:
        return os.system, ("touch evil_was_here",)


def class_by_a_detour(name: str) -> bytes:
    """A pickle that reaches a class by the attributes of one that is allowed, and calls it."""
    module = b"torch.distributed.checkpoint.filesystem"
    return b"\x80\x04" + b"".join(b"\x8c" + bytes([len(w)]) + w for w in (module, name.encode())) + b"\x93)R."


def by_a_detour(folder: Path) -> None:
    (folder / ".metadata").write_bytes(class_by_a_detour("_StorageInfo.__init__.__class__"))
    write_manifest(folder, crc32={})  # whoever sends a checkpoint can send a manifest with it


class Attribute:
    """As a member of an enumeration was pickled, of a class that is none."""

    def __reduce__(self) -> tuple:
        return getattr, (filesystem._StorageInfo, "__init__")


def attribute_of_a_class(folder: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Attribute()))
    write_manifest(folder, crc32={})


def edit_metadata(folder: Path, change: Callable[[Any], object]) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    write_manifest(folder, crc32={})


def without_storage(folder: Path) -> None:
    edit_metadata(folder, lambda metadata: setattr(metadata, "storage_data", None))


def dtype_that_is_none(folder: Path) -> None:
    key = "decoder.final_layernorm.weight"
    edit_metadata(folder, lambda metadata: setattr(metadata.state_dict_metadata[key].properties, "dtype", {}))


def place_of_a_word(folder: Path) -> None:
    edit_metadata(folder, lambda metadata: setattr(next(iter(metadata.storage_data.values())), "offset", "x"))


def without_a_block(folder: Path) -> None:
    key = "decoder.layers.mlp.linear_fc2.weight"
    edit_metadata(folder, lambda metadata: metadata.state_dict_metadata[key].chunks.pop())


def of_another_dtype(metadata: Any) -> None:
    entry = metadata.state_dict_metadata["decoder.final_layernorm.weight"]
    entry.properties.dtype = torch.bfloat16


def drop(name: str) -> Callable[[Path], object]:
    return lambda folder: next(folder.glob(name)).unlink()


def cut_file(folder: Path) -> None:
    file = next(folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-64])


def evil_metadata(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))


MALFORMED_CHECKPOINTS = {
    "a file missing": (drop("*.distcp"), [], "which its manifest.json lists"),
    "a file cut off": (cut_file, [], "it is not what was written"),
    "a bit flipped": (
        lambda f: flip_a_bit(f, f.parent / "source"),
        [],
        ".distcp, tensor decoder.layers.mlp.linear_fc1.weight at byte ",
    ),
    "a bit flipped in somebody else's": (
        lambda f: (flip_a_bit(f, f.parent / "source"), (f / "manifest.json").unlink()),
        ["--trust"],
        "has another content than was written (its crc32 is wrong)",
    ),
    "a manifest nested without end": (
        lambda f: (f / "manifest.json").write_text("[" * 100_000),
        [],
        "manifest.json is no manifest of a checkpoint",
    ),
    "metadata changed": (
        lambda f: (f / ".metadata").write_bytes((f / ".metadata").read_bytes()[:-1] + b"x"),
        [],
        ".metadata is not the file that manifest.json has the digest of",
    ),
    "its other pickle changed": (
        lambda f: (f / "common.pt").write_bytes(bytes((f / "common.pt").stat().st_size)),
        [],
        "common.pt is not the file that manifest.json has the digest of",
    ),
    "a file outside": (
        lambda f: edit_metadata(
            f,
            lambda metadata: setattr(
                next(iter(metadata.storage_data.values())), "relative_path", "../source/config.json"
            ),
        ),
        [],
        "names '../source/config.json', which is no file of its own folder",
    ),
    "somebody else's": (drop("manifest.json"), [], "has no manifest.json: rloop did not write it"),
    "somebody else's, which runs code": (evil_metadata, ["--trust"], "it asks for posix.system"),
    "classes by a detour": (by_a_detour, [], "it asks for torch.distributed.checkpoint.filesystem._StorageInfo."),
    "an attribute of a class": (attribute_of_a_class, [], "it asks for '__init__' of <class 'torch"),
    "no storage": (without_storage, [], "cannot be read: TypeError"),
    "a block missing": (without_a_block, [], "its blocks have 3840 elements, and it has 5120"),
    "tied by the config": (
        lambda f: edit_config(f / "hf", tie_word_embeddings=True),
        [],
        "has an output_layer.weight of its own",
    ),
    "no metadata": (drop(".metadata"), [], "is no Megatron checkpoint of format torch_dist"),
    "another size in the config": (
        lambda f: edit_config(f / "hf", vocab_size=64),
        [],
        "tensor embedding.word_embeddings.weight has shape [61, 32]",
    ),
    "more layers in the config": (
        lambda f: edit_config(f / "hf", num_hidden_layers=5, layer_types=None),
        [],
        "has shape [4, 32], ",
    ),
    "no config": (lambda f: shutil.rmtree(f / "hf"), [], "give --config"),
    "another family": (
        lambda f: edit_config(f / "hf", architectures=["Qwen3ForCausalLM"], model_type="qwen3"),
        [],
        "q_layernorm",
    ),
    "a dtype that is none": (dtype_that_is_none, [], "is {}; it has to be float32"),
    "a place that is a word": (place_of_a_word, [], "cannot be read: ValueError"),
}


@pytest.mark.parametrize("how", MALFORMED_CHECKPOINTS)
def test_a_malformed_checkpoint_is_one_sentence(
    source: Path, tmp_path: Path, how: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    damage, options, sentence = MALFORMED_CHECKPOINTS[how]
    assert main(["convert", str(source), str(tmp_path / "mcore")]) == 0
    damage(tmp_path / "mcore")
    refused([tmp_path / "mcore", tmp_path / "back", *options], sentence, tmp_path / "back", capsys)
    assert not (tmp_path / "evil_was_here").exists()


def test_a_dtype_that_the_blocks_do_not_have_is_found(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["convert", str(source), str(tmp_path / "mcore")]) == 0
    edit_metadata(tmp_path / "mcore", of_another_dtype)
    refused([tmp_path / "mcore", tmp_path / "back"], "its metadata says torch.bfloat16", tmp_path / "back", capsys)


def test_rows_beyond_the_vocabulary_are_dropped_with_a_warning(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["convert", str(source), str(tmp_path / "whole")]) == 0
    assert main(["convert", str(tmp_path / "whole"), str(tmp_path / "of-whole")]) == 0
    assert "warning" not in capsys.readouterr().out
    assert main(["convert", str(source), str(tmp_path / "mcore"), "--tp", "2"]) == 0  # padded to 62 rows
    assert main(["convert", str(tmp_path / "mcore"), str(tmp_path / "back")]) == 0
    assert "has 62 rows and the config's vocab_size is 61: the rest is dropped" in capsys.readouterr().out


def test_blocks_that_overlap_do_not_make_up_a_tensor(tmp_path: Path) -> None:
    """Of four elements the first two, and the middle ones: as many as there are. The last was whatever memory held."""
    file = BlockFile(tmp_path / "__0_0.distcp")
    for first in (0, 1):
        file.add("w", ((first,), (2,)), torch.ones(2))
    file.close()
    finish(tmp_path, [file], {"w": (torch.float32, (4,))})
    reader = BlockReader(tmp_path)
    with pytest.raises(UserError, match=r"tensor w: two of its blocks overlap"):
        reader.check("w")
    with pytest.raises(UserError, match=r"of tensor w from \[2\] on, \[2\], there are 1 of 2 elements"):
        reader.read("w", ((2,), (2,)))
