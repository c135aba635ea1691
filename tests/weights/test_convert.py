"""`rloop convert` as a user calls it. That Megatron loads what it writes, and it reads what Megatron saves at every
layout, is test_bridge_parallel's."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import edit_tensors, refused
from safetensors.torch import load_file, save_file
from tiny_models import make_folder
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
from torch.distributed.checkpoint.planner import WriteItemType

from rloop_mcore.main.cli import main
from rloop_mcore.weights import hf_to_mcore, mcore_to_hf
from rloop_mcore.weights.digest import digest_of
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


def test_checkpoints_of_early_python_3_11_are_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Debian 12 has 3.11.2, which pickles the members of an enumeration by getattr."""

    def as_then(member: Any, protocol: int) -> tuple:
        return getattr, (type(member), member.name)

    for kind in (_MEM_FORMAT_ENCODING, WriteItemType):
        monkeypatch.setattr(kind, "__reduce_ex__", as_then)
    assert main(["convert", str(source), str(tmp_path / "mcore")]) == 0
    assert b"getattr" in (tmp_path / "mcore" / ".metadata").read_bytes()
    assert main(["convert", str(tmp_path / "mcore"), str(tmp_path / "back")]) == 0
    assert digest_of(tmp_path / "back") == digest_of(source)


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
