"""`rloop convert` as a user calls it. That Megatron loads what it writes, and it reads what Megatron saves at every
layout, is test_bridge_parallel's."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_folder

from rloop_mcore.main.cli import main
from rloop_mcore.platform.manifest import write_manifest
from rloop_mcore.weights import conversion, hf_to_mcore, mcore_to_hf
from rloop_mcore.weights.digest import digest_of
from rloop_mcore.weights.hf_folder import TensorReader, TensorWriter
from rloop_mcore.weights.sections import Layout
from rloop_mcore.weights.torch_dist import BlockFile, BlockReader, finish

sys.path.append(str(Path(__file__).parents[2] / "tools" / "bench"))

import convert as bench

CASES = {
    "qwen2": {"family": "qwen2", "kv_heads": 2, "ratio": 7, "tied": False},
    "qwen2-bf16": {"family": "qwen2", "kv_heads": 1, "ratio": 4, "tied": True, "dtype": torch.bfloat16},
    "llama": {"family": "llama", "kv_heads": 2, "ratio": 1, "tied": True},
    "mistral": {"family": "mistral", "kv_heads": 2, "ratio": 4, "tied": False},
    "qwen3": {"family": "qwen3", "kv_heads": 2, "ratio": 2, "tied": True},
    "qwen3-moe": {"family": "qwen3_moe", "kv_heads": 2, "ratio": 2, "tied": False},
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make_folder(tmp_path / "source", "qwen2", kv_heads=2, ratio=2, tied=False)
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    return tmp_path / "source"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_is_bit_identical(name: str, tmp_path: Path) -> None:
    source, mcore, back = tmp_path / "source", tmp_path / "mcore", tmp_path / "back"
    make_folder(source, **CASES[name])
    (source / "tokenizer.json").write_text('{"a": 1}')
    assert main(["convert", str(source), str(mcore), "--threads", "3"]) == 0
    assert main(["convert", str(mcore), str(back), "--threads", "3"]) == 0
    before, after = tensors_of(source), tensors_of(back)
    assert before.keys() == after.keys()
    for tensor in before:
        assert before[tensor].dtype == after[tensor].dtype
        assert torch.equal(before[tensor].view(torch.uint8), after[tensor].view(torch.uint8)), tensor
    assert json.loads((back / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert (back / "tokenizer.json").read_text() == '{"a": 1}'


@pytest.mark.parametrize("options", [["--tp", "2"], ["--pp", "2"], ["--tp", "4", "--pp", "4"]])
def test_files_are_cut_as_the_ranks_of_a_layout_would(source: Path, tmp_path: Path, options: list[str]) -> None:
    mcore, back = tmp_path / "mcore", tmp_path / "back"
    assert main(["convert", str(source), str(mcore), *options, "--threads", "1"]) == 0
    ranks = {file.name.split("_")[2] for file in mcore.glob("*.distcp")}
    tp = int(options[1]) if options[0] == "--tp" else 1
    pp = int(options[-1]) if "--pp" in options else 1
    assert ranks == {str(rank) for rank in range(tp * pp)}
    blocks = BlockReader(mcore).tensors["decoder.layers.mlp.linear_fc2.weight"].boxes
    assert {sizes for _, sizes in blocks} == {(1, 32, 40 // tp)}
    assert main(["convert", str(mcore), str(back)]) == 0
    assert digest_of(back) == digest_of(source)


def test_every_rank_has_a_file_of_its_own_stage_and_experts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_folder(tmp_path / "source", **CASES["qwen3-moe"])  # 4 layers of 4 experts
    arguments = [tmp_path / "source", tmp_path / "mcore"]
    refused([*arguments, "--ep", "3"], "--ep 3 does not divide the 4 experts of a layer", tmp_path / "mcore", capsys)
    layout = ["--tp", "2", "--pp", "2", "--ep", "2", "--threads", "1"]
    assert main(["convert", *map(str, arguments), *layout]) == 0
    ranks: dict[tuple[str, tuple[int, ...]], set[int]] = {}
    for index, info in pickle.loads((tmp_path / "mcore" / ".metadata").read_bytes()).storage_data.items():
        if not index.fqn.rpartition("/")[0].endswith("_extra_state"):
            stack = tuple(index.offset)[
                : 2 if ".experts." in index.fqn else int(index.fqn.startswith("decoder.layers"))
            ]
            ranks.setdefault((index.fqn, stack), set()).add(int(info.relative_path.split("_")[2]))
    assert ranks["embedding.word_embeddings.weight", ()] == {0, 1}  # (stage * ep + expert rank) * tp + tp rank
    assert ranks["output_layer.weight", ()] == {4, 5}
    assert ranks["decoder.final_layernorm.weight", ()] == {4}
    for layer in range(4):
        first = layer // 2 * 4
        assert ranks["decoder.layers.self_attention.linear_proj.weight", (layer,)] == {first, first + 1}
        for expert in range(4):
            own = first + expert // 2 * 2
            assert ranks["decoder.layers.mlp.experts.experts.linear_fc1.weight", (layer, expert)] == {own, own + 1}


OF_EVERY_LAYER = ["self_attention.linear_qkv.layer_norm_weight", "self_attention.linear_qkv.weight"]
OF_EVERY_LAYER += ["self_attention.linear_proj.weight", "mlp.linear_fc1.layer_norm_weight"]
OF_A_LAYER = {
    "qwen2": ["self_attention.linear_qkv.bias", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"],
    "qwen3-moe": [
        *("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight", "mlp.router.weight"),
        *("mlp.experts.experts.linear_fc1.weight", "mlp.experts.experts.linear_fc2.weight"),
        "pre_mlp_layernorm.weight",  # where Transformer Engine's modules look for it
    ],
}


@pytest.mark.parametrize("name", OF_A_LAYER)
def test_a_checkpoint_has_the_keys_that_megatron_looks_for(name: str, tmp_path: Path) -> None:
    make_folder(tmp_path / "source", **CASES[name])  # 4 layers, of 4 experts
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "mcore"), "--pp", "2"]) == 0
    keys = {f"decoder.layers.{key}" for key in OF_EVERY_LAYER + OF_A_LAYER[name]}
    keys |= {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"}
    modules = [f"self_attention.{module}" for module in ("linear_qkv", "linear_proj", "core_attention")]
    modules += [f"mlp.{module}" for module in ("linear_fc1", "linear_fc2") if name == "qwen2"]
    keys |= {f"decoder.layers.{module}._extra_state/shard_{n}_4" for module in modules for n in range(4)}
    for module in ("linear_fc1", "linear_fc2") if name == "qwen3-moe" else ():
        experts = [f"shard_{layer}.{expert}_4.4" for layer in range(4) for expert in range(4)]
        keys |= {f"decoder.layers.mlp.experts.experts.{module}._extra_state/{shard}" for shard in experts}
    metadata = pickle.loads((tmp_path / "mcore" / ".metadata").read_bytes())
    assert metadata.state_dict_metadata.keys() == keys
    assert {index.fqn for index in metadata.storage_data} == keys


def test_a_dtype_can_be_asked_for(source: Path, tmp_path: Path) -> None:
    mcore, back, direct = tmp_path / "mcore", tmp_path / "back", tmp_path / "direct"
    assert main(["convert", str(source), str(mcore), "--dtype", "bf16", "--tp", "2"]) == 0
    assert main(["convert", str(mcore), str(back)]) == 0
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"
    found = tensors_of(back)
    for name, tensor in tensors_of(source).items():
        assert torch.equal(found[name], tensor.bfloat16()), name
    assert main(["convert", str(mcore), str(direct), "--dtype", "fp32"]) == 0
    assert all(torch.equal(tensor, found[name].float()) for name, tensor in tensors_of(direct).items())


def test_a_value_that_float16_has_no_room_for_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    edit_tensors(source, lambda t: t["model.norm.weight"].__setitem__(0, -1e5))
    assert main(["convert", str(source), str(tmp_path / "mcore")]) == 0
    for folder in (source, tmp_path / "mcore"):
        assert main(["convert", str(folder), str(tmp_path / "half"), "--dtype", "fp16"]) == 2
        assert "model.norm.weight has values beyond float16's 65504" in capsys.readouterr().err
        assert not (tmp_path / "half").exists()


def test_what_rounds_to_an_infinity_is_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    edit_tensors(source, lambda t: t["model.norm.weight"].__setitem__(0, 3.4e38))  # a number in float32
    assert main(["convert", str(source), str(tmp_path / "mcore")]) == 0
    for folder in (source, tmp_path / "mcore"):
        assert main(["convert", str(folder), str(tmp_path / "half"), "--dtype", "bf16"]) == 2
        assert "model.norm.weight has values beyond bfloat16's 3.38953e+38" in capsys.readouterr().err
        assert not (tmp_path / "half").exists()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused(
    value: float, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    edit_tensors(source, lambda t: t["model.layers.1.mlp.up_proj.weight"].__setitem__((3, 2), value))
    assert main(["convert", str(source), str(tmp_path / "mcore")]) == 2
    assert "model.layers.1.mlp.up_proj.weight holds NaN or infinity" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    monkeypatch.setattr(hf_to_mcore, "check_finite", lambda *ignored: None)
    assert main(["convert", str(source), str(tmp_path / "mcore")]) == 0
    assert main(["convert", str(tmp_path / "mcore"), str(tmp_path / "back")]) == 2
    assert "model.layers.1.mlp.up_proj.weight holds NaN or infinity" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_each_tensor_keeps_its_dtype(source: Path, tmp_path: Path) -> None:
    mixed = {n: t.bfloat16() if n.endswith("_proj.weight") else t for n, t in tensors_of(source).items()}
    save_file(mixed, source / "model.safetensors")
    assert main(["convert", str(source), str(tmp_path / "mcore")]) == 0
    assert main(["convert", str(tmp_path / "mcore"), str(tmp_path / "back")]) == 0
    assert digest_of(tmp_path / "back") == digest_of(source)
    for folder in (tmp_path / "mcore" / "hf", tmp_path / "back"):
        assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"  # the source's


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = sorted(tmp_path.iterdir())
    assert main(["convert", str(source), str(tmp_path / "mcore"), "--pp", "2", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "51 tensors" in said
    assert "__1_0.distcp" in said
    assert "largest tensor" in said
    assert sorted(tmp_path.iterdir()) == before


def records(folder: Path, file: str) -> int:
    """Bytes of tensors in a checkpoint's file."""
    content, total = (folder / file).read_bytes(), 0
    for info in pickle.loads((folder / ".metadata").read_bytes()).storage_data.values():
        if info.relative_path == file:
            with zipfile.ZipFile(io.BytesIO(content[info.offset : info.offset + info.length])) as archive:
                total += sum(record.file_size for record in archive.infolist() if record.filename.endswith("/data/0"))
    return total


@pytest.mark.parametrize(
    ("name", "layout", "dtype"),
    [
        ("llama", Layout(), None),
        ("qwen2", Layout(tp=2, pp=2), torch.bfloat16),
        ("qwen3-moe", Layout(ep=2), None),  # it has a norm under two keys
    ],
)
def test_what_is_planned_is_written_to_the_byte(
    name: str, layout: Layout, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    make_folder(source, **CASES[name])
    there = hf_to_mcore.plan(source, tmp_path / "mcore", layout, dtype, threads=2)
    there.run(lambda size: None)
    assert there.files == {file.name: records(tmp_path / "mcore", file.name) for file in there.target.glob("*.distcp")}
    back = mcore_to_hf.plan(tmp_path / "mcore", tmp_path / "back", torch.float32)
    back.run(lambda size: None)
    written = {file.name: sum(t.nbytes for t in load_file(file).values()) for file in back.target.glob("*.safetensors")}
    assert back.files == written
    assert there.tensors == back.tensors == len(tensors_of(source))


def test_a_source_without_tokenizer_files_converts_with_a_warning(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (source / "tokenizer.json").unlink()
    assert main(["convert", str(source), str(tmp_path / "mcore")]) == 0
    assert "warning: " in (said := capsys.readouterr().out)
    assert "has no tokenizer files" in said


def test_a_folder_with_the_hubs_metadata_is_a_folder(source: Path, tmp_path: Path) -> None:
    (source / "metadata.json").write_text("{}")
    assert main(["convert", str(source), str(tmp_path / "mcore")]) == 0
    assert main(["convert", str(tmp_path / "mcore"), str(tmp_path / "back")]) == 0
    assert digest_of(tmp_path / "back") == digest_of(source)


def test_a_checkpoint_with_a_config_beside_it_is_a_checkpoint(source: Path, tmp_path: Path) -> None:
    assert main(["convert", str(source), str(tmp_path / "mcore")]) == 0
    shutil.copy(source / "config.json", tmp_path / "mcore")
    assert main(["convert", str(tmp_path / "mcore"), str(tmp_path / "back")]) == 0
    assert digest_of(tmp_path / "back") == digest_of(source)


@pytest.mark.parametrize("name", ["qwen2", "qwen3-moe"])
def test_a_checkpoint_with_a_tensor_for_each_layer(name: str, tmp_path: Path) -> None:
    """As Megatron saves layers that are not all alike."""
    source = tmp_path / "source"
    make_folder(source, **CASES[name])
    assert main(["convert", str(source), str(tmp_path / "mcore")]) == 0
    stacked, by_layer = BlockReader(tmp_path / "mcore"), tmp_path / "by_layer"
    by_layer.mkdir()
    file, tensors = BlockFile(by_layer / "__0_0.distcp"), {}
    for key, stored in stacked.tensors.items():
        if name == "qwen3-moe" and key.endswith("fc1.layer_norm_weight"):  # what Megatron has under one of two keys
            continue
        whole = stacked.read(key, ((0,) * len(stored.shape), stored.shape))
        layers = {key.replace("layers.", f"layers.{n}.", 1): whole[n] for n in range(4)}
        for own, tensor in (layers if ".layers." in key else {key: whole}).items():
            file.add(own, ((0,) * tensor.dim(), tuple(tensor.shape)), tensor)
            tensors[own] = stored.dtype, tuple(tensor.shape)
    file.close()
    finish(by_layer, [file], tensors)
    assert main(["convert", str(by_layer), str(tmp_path / "back"), "--config", str(source)]) == 0
    assert digest_of(tmp_path / "back") == digest_of(source)


def test_sizes_that_a_config_leaves_out(tmp_path: Path) -> None:
    """As Llama 2's: every head has its key and value, and they share the hidden size."""
    source = tmp_path / "source"
    make_folder(source, "llama", kv_heads=4, ratio=1, tied=False, hidden_size=64)
    config = json.loads((source / "config.json").read_text())
    assert (config.pop("num_key_value_heads"), config.pop("head_dim")) == (4, 16)
    (source / "config.json").write_text(json.dumps(config))
    assert main(["convert", str(source), str(tmp_path / "mcore")]) == 0
    assert BlockReader(tmp_path / "mcore").tensors["decoder.layers.self_attention.linear_qkv.weight"].shape == (
        4,
        192,
        64,
    )


def test_the_buffers_of_old_llamas_are_left_out(tmp_path: Path) -> None:
    source, name = tmp_path / "source", "model.layers.0.self_attn.rotary_emb.inv_freq"
    make_folder(source, **CASES["llama"])
    before = digest_of(source)
    edit_tensors(source, lambda t: t.update({name: torch.ones(8)}))
    assert main(["convert", str(source), str(tmp_path / "mcore")]) == 0
    assert main(["convert", str(tmp_path / "mcore"), str(tmp_path / "back")]) == 0
    assert digest_of(tmp_path / "back") == before


def test_chat_templates_that_have_a_name_are_copied(source: Path, tmp_path: Path) -> None:
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    assert main(["convert", str(source), str(tmp_path / "mcore")]) == 0
    assert main(["convert", str(tmp_path / "mcore"), str(tmp_path / "back")]) == 0
    assert (tmp_path / "back" / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"


# -- what cannot be converted -----------------------------------------------------------------------------------------


def edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def in_bf16(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {name: tensors[name].bfloat16()}


def in_two_shards(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    plan = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    (folder / "model.safetensors").unlink()
    with TensorWriter(folder, plan, sum(t.nbytes for t in tensors.values()) * 2 // 3) as writer:
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


def refused(arguments: list[object], sentence: str, target: Path, capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    before = sorted(target.parent.iterdir())
    assert main(["convert", *map(str, arguments)]) == 2
    said = capsys.readouterr().err.strip()
    assert sentence in said
    assert len(said.splitlines()) == 1
    assert sorted(target.parent.iterdir()) == before  # nothing written


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


def flip_a_bit(folder: Path, source: Path) -> None:
    """In the last element of a tensor."""
    own = load_file(source / "model.safetensors")["model.layers.2.mlp.up_proj.weight"].numpy().tobytes()
    (file,) = (file for file in folder.glob("*.distcp") if own in file.read_bytes())
    content = bytearray(file.read_bytes())
    content[content.find(own) + len(own) - 4] ^= 1
    file.write_bytes(content)


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


# -- what goes wrong on the way ---------------------------------------------------------------------------------------


def test_a_byte_that_was_written_wrongly_is_found(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = hf_to_mcore.finish

    def damaged(folder: Path, *arguments: object) -> None:
        flip_a_bit(folder, source)
        whole(folder, *arguments)

    monkeypatch.setattr(hf_to_mcore, "finish", damaged)
    assert main(["convert", str(source), str(tmp_path / "mcore")]) == 1
    said = capsys.readouterr().err
    assert "model.layers.2.mlp.up_proj.weight, mapped back from its files, is not what was read" in said
    assert not (tmp_path / "mcore").exists()


def test_a_byte_of_a_folder_that_was_written_wrongly_is_found(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["convert", str(source), str(tmp_path / "mcore")]) == 0

    def damaged(folder: Path) -> TensorReader:
        edit_tensors(folder, lambda t: t["model.layers.3.self_attn.k_proj.bias"].view(torch.int32)[-1:].bitwise_xor_(1))
        return TensorReader(folder)

    monkeypatch.setattr(mcore_to_hf, "TensorReader", damaged)
    assert main(["convert", str(tmp_path / "mcore"), str(tmp_path / "back")]) == 1
    assert "k_proj.bias, model.layers.3.self_attn.v_proj.bias, mapped back from its files" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mcore", "source"]


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts jobs in the background has it ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup this one
from rloop_mcore.main.cli import main
from rloop_mcore.weights import torch_dist
add = torch_dist.BlockFile.add
def slow(*arguments):
    add(*arguments)
    print("block", flush=True)
    time.sleep(2)
torch_dist.BlockFile.add = slow
sys.exit(main(["convert", *sys.argv[1:]]))
"""


def test_a_killed_conversion_leaves_nothing_that_looks_whole_and_can_be_repeated(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "mcore"
    process = subprocess.Popen([sys.executable, "-c", SLOW, source, target], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "block" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert not target.exists()
    (left,) = tmp_path.glob(".tmp-*-mcore")
    for path in [left, *left.rglob("*")]:
        os.utime(path, (time.time() - 100, time.time() - 100))
    assert main(["convert", str(source), str(target)]) == 0
    assert not left.exists()
    assert main(["convert", str(target), str(tmp_path / "back")]) == 0
    assert digest_of(tmp_path / "back") == digest_of(source)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_at_once_and_leaves_nothing(number: int, source: Path, tmp_path: Path) -> None:
    """Ctrl-C, scancel and a terminal that is closed."""
    command = [sys.executable, "-c", SLOW, source, tmp_path / "mcore", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "block" not in process.stdout.readline():
        pass
    process.send_signal(number)
    assert process.wait(25) == 130  # all of it, 35 blocks, would take 70 s
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_was_killed_just_before_is_removed_at_the_end(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / ".tmp-2-mcore"
    left.mkdir()
    whole = hf_to_mcore.finish

    def a_minute_later(*arguments: Any) -> None:
        assert left.exists()  # it might be another machine's, whose lock isn't seen here
        os.utime(left, (time.time() - 100, time.time() - 100))
        whole(*arguments)

    monkeypatch.setattr(hf_to_mcore, "finish", a_minute_later)
    assert main(["convert", str(source), str(tmp_path / "mcore")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mcore", "source"]


def test_a_file_that_takes_no_more_is_named_by_what_the_system_says(tmp_path: Path) -> None:
    file = BlockFile(tmp_path / "blocks")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            file.add("key", ((0,), (100_000,)), torch.zeros(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_is_full_at_the_last_small_file_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "common.pt").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        finish(tmp_path, [], {})


@pytest.mark.parametrize("how", ["another", "none"])
def test_a_source_that_is_replaced_meanwhile_is_converted_as_it_was(how: str, source: Path, tmp_path: Path) -> None:
    before, file = digest_of(source), source / "model.safetensors"
    conversion = hf_to_mcore.plan(source, tmp_path / "mcore", Layout())
    tensors = dict(sorted(load_file(file).items(), reverse=True))
    file.unlink()
    if how == "another":
        plan = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        with TensorWriter(source, plan) as writer:  # in another order
            for name, tensor in tensors.items():
                writer.write(name, tensor * 2)
    conversion.run(lambda size: None)
    assert main(["convert", str(tmp_path / "mcore"), str(tmp_path / "back")]) == 0
    assert digest_of(tmp_path / "back") == before


def test_a_target_that_somebody_made_meanwhile_is_left_alone(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = hf_to_mcore.finish

    def late(*arguments: Any) -> None:
        (tmp_path / "mcore").mkdir()
        (tmp_path / "mcore" / "precious").write_text("x")
        whole(*arguments)

    monkeypatch.setattr(hf_to_mcore, "finish", late)
    assert main(["convert", str(source), str(tmp_path / "mcore")]) == 1
    assert "was made by somebody else meanwhile" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mcore").iterdir()] == ["precious"]


def test_what_another_process_is_writing_is_left_alone(source: Path, tmp_path: Path) -> None:
    mine = f".tmp-{os.getpid()}-mcore"  # in another container
    others = [tmp_path / name for name in (mine, ".tmp-2-mcore", ".tmp-3-my-mcore")]
    for number, other in enumerate(others):
        other.mkdir()
        if number:  # quiet for long: the second is locked, the third has another target
            os.utime(other, (time.time() - 1000, time.time() - 1000))
    lock = os.open(others[1], os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert main(["convert", str(source), str(tmp_path / "mcore")]) == 0
    os.close(lock)
    assert all(other.exists() for other in others)


def test_copies_wait_for_room() -> None:
    memory, held = conversion.Memory(10), []

    def work(size: int) -> None:
        with memory.of(size):
            held.append(size)
            assert sum(held) <= 10 or held == [25]
            time.sleep(0.01)
            held.remove(size)

    conversion.in_threads([lambda n=n: work(n) for n in (4, 6, 3, 25, 7, 10, 1)], 4, memory)


def test_the_model_of_the_bench_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 61}
    monkeypatch.setattr(bench, "CONFIG", bench.CONFIG | small)
    bench.write_model(tmp_path / "source", layers=2)
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "mcore")]) == 0


SMOLLM2 = Path(os.environ.get("RLOOP_SMOLLM2", "runs/smollm2/model"))
GENERATE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (c.from_pretrained(sys.argv[1]) for c in (AutoModelForCausalLM, AutoTokenizer))
ids = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.float().generate(**ids, max_new_tokens=24, do_sample=False)[0]))
"""


@pytest.mark.skipif(not (SMOLLM2 / "config.json").is_file(), reason=f"no {SMOLLM2}: tools/prepare_smollm2.py makes it")
def test_real_weights_generate_the_same_text_after_there_and_back(tmp_path: Path) -> None:
    hf_to_mcore.plan(SMOLLM2, tmp_path / "mcore", Layout(tp=3, pp=2)).run(lambda size: None)
    assert main(["convert", str(tmp_path / "mcore"), str(tmp_path / "back")]) == 0
    assert digest_of(tmp_path / "back") == digest_of(SMOLLM2)
    texts = [
        subprocess.run([sys.executable, "-c", GENERATE, folder], capture_output=True, text=True, check=True).stdout
        for folder in (SMOLLM2, tmp_path / "back")
    ]
    assert texts[0] == texts[1]
    assert len(texts[0].split()) > 10
