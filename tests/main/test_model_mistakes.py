"""What is wrong with a model's folder is said before ranks and engines are started, and when a job is submitted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from rloop_mcore.data.countdown_model import write_model
from rloop_mcore.errors import UserError
from rloop_mcore.hf_config import read_hf_config
from rloop_mcore.main import train
from rloop_mcore.main.cli import main

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}


def change_config(model: Path, **changes: Any) -> None:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(tmp_path: Path) -> str:
    command = ["experiment=tiny", f"run.dir={tmp_path / 'run'}", f"model.path={tmp_path / 'model'}"]
    command += [f"model.architecture.{key}=null" for key in ("model_type", "num_key_value_heads")]
    with pytest.raises(UserError) as caught:
        train.train(command, force=False)
    assert not (tmp_path / "run").exists()
    return str(caught.value).removeprefix(f"{tmp_path / 'model'}/")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rms_norm_eps": "1e-6"}, "config.json: rms_norm_eps is '1e-6'; it has to be a number"),
        ({"rms_norm_eps": 0.0}, "config.json: rms_norm_eps is 0.0; it has to be a number above 0"),
        ({"dtype": "F8"}, "config.json: dtype is 'F8'; it has to be one of float32, bfloat16"),
        ({"torch_dtype": ["bfloat16"]}, "config.json: torch_dtype is ['bfloat16']; it has to be one of"),
        ({"eos_token_id": [1, "<eos>"]}, "config.json: eos_token_id is [1, '<eos>']; it has to be a whole number, a"),
        ({"pad_token_id": True}, "config.json: pad_token_id is True; it has to be a whole number or null"),
        ({"use_cache": "yes"}, "config.json: use_cache is 'yes'; it has to be true or false"),
        ({"tie_word_embeddings": 1}, "config.json: tie_word_embeddings is 1; it has to be true or false"),
        ({"is_causal": None}, "config.json: is_causal is None; it has to be true or false"),
        ({"layer_types": "full_attention"}, "config.json: layer_types is 'full_attention'; it has to be a list"),
        (
            {"layer_types": ["full_attention"]},
            "config.json: layer_types is ['full_attention']; only 'full_attention' for",
        ),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            "config.json: layer_types is ['full_attention', 'sliding_attention']; only 'full_attention' for each",
        ),
        ({"pad_token_id": 48}, "config.json: pad_token_id is 48, and vocab_size 48: set it to an id of the vocabulary"),
        ({"head_dim": None}, "config.json: head_dim is null, which engines don't take for its usual value"),
        ({"auto_map": 3}, "config.json: auto_map is 3; it has to be an object or null"),
        ({"rope_parameters": 0}, "config.json: the rotary parameters are 0; they have to be an object"),
        ({"rope_parameters": None, "rope_theta": None}, "config.json: rope_theta is None; it has to be a number"),
        ({"attention_dropout": 0.1}, "config.json: attention_dropout is 0.1; only 0.0 is supported"),
        ({"rope_scaling": YARN}, "config.json: rope scaling {'rope_type': 'yarn', "),
        ({"rope_parameters": YARN}, "config.json: rope scaling {'rope_type': 'yarn', "),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "config.json: quantization_config is {'quant_method': 'fp8'",
        ),
        (
            {"architectures": ["Gemma3ForCausalLM"]},
            "config.json: architectures is ['Gemma3ForCausalLM']; supported are",
        ),
        (
            {"model_type": "llama"},
            "config.json: model_type is 'llama', and architectures is of qwen2: set model_type to",
        ),
        ({"model_type": None}, "config.json: model_type is None; it has to be a text"),
        ({"num_key_value_heads": 4}, "model.safetensors: tensor model.layers.0.self_attn.k_proj.weight has shape [48"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_mistakes_in_config_json(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    write_model(tmp_path / "model", seed=0)
    change_config(tmp_path / "model", **changes)
    assert refused(tmp_path).startswith(sentence)


def test_a_key_that_transformers_takes_no_null_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe", "num_experts": null, "num_local_experts": 4}')
    with pytest.raises(UserError, match=r"config\.json: num_experts is null, which engines don't take for"):
        read_hf_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        (
            "generation_config.json",
            '{"eos_token_id": 1,}',
            "generation_config.json is no JSON object (Expecting property",
        ),
        (
            "generation_config.json",
            '{"eos_token_id": ["<eos>"]}',
            "generation_config.json: eos_token_id is ['<eos>']; it",
        ),
        ("special_tokens_map.json", "[]", "special_tokens_map.json is no JSON object (it is [])"),
        ("added_tokens.json", "", "added_tokens.json is no JSON object (Expecting value"),
        (
            "tokenizer_config.json",
            '{"eos_token": "<eos>", "pad_token": 0}',
            "tokenizer_config.json: pad_token is 0; it must be a text",
        ),
    ],
    ids=lambda value: value,
)
def test_mistakes_in_the_files_beside_it(name: str, text: str, sentence: str, tmp_path: Path) -> None:
    write_model(tmp_path / "model", seed=0)
    (tmp_path / "model" / name).write_text(text)
    assert refused(tmp_path).startswith(sentence)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    write_model(tmp_path / "model", seed=0)
    tokenizer = Tokenizer.from_file(str(tmp_path / "model/tokenizer.json"))
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(tmp_path / "model/tokenizer.json"))
    (tmp_path / "model/tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    assert ": its tokenizer has token 48 in a prompt or at its end, and the model's vocab_size is 48:" in refused(
        tmp_path
    )


@pytest.mark.parametrize(
    ("name", "tensor", "sentence"),
    [
        ("model.norm.weight", None, "lacks tensor model.norm.weight [96], which its config.json calls for"),
        ("model.norm.weight", torch.zeros(4), "tensor model.norm.weight has shape [4], config.json calls for [96]"),
        ("model.norm.weight", torch.zeros(96, dtype=torch.float8_e4m3fn), "is F8_E4M3; it has to be F32, BF16 or F16"),
        ("vision.weight", torch.zeros(4), "holds tensor vision.weight, which this family does not know"),
    ],
)
def test_mistakes_in_tensors(name: str, tensor: torch.Tensor | None, sentence: str, tmp_path: Path) -> None:
    write_model(tmp_path / "model", seed=0)
    file = tmp_path / "model/model.safetensors"
    tensors = load_file(file) | {name: tensor}
    save_file({key: value for key, value in tensors.items() if value is not None}, file)
    assert sentence in refused(tmp_path)


def test_a_job_is_not_submitted_with_such_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "model", seed=0)
    command = ["launch", "experiment=tiny", f"run.dir={tmp_path / 'run'}", f"model.path={tmp_path / 'model'}"]
    assert main([*command, "--dry-run"]) == 0
    change_config(tmp_path / "model", rope_parameters=YARN)
    capsys.readouterr()
    assert main([*command, "--dry-run"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "rope scaling {'rope_type': 'yarn', " in err


def test_a_job_in_an_image_needs_an_interpreter_with_sglang_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["launch", "experiment=tiny", f"run.dir={tmp_path}/r", "rollout.engine=sglang", "--dry-run"]
    command += ["cluster.slurm.container=pyxis", "cluster.slurm.image=x"]
    assert main(command) == 2
    assert "rollout.engine=sglang needs rollout.python=" in capsys.readouterr().err
    assert main([*command, "rollout.python=/only/in/the/image"]) == 0
