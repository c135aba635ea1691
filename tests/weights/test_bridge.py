"""HF -> Megatron -> HF in one process: logits as transformers computes them, tensors bit for bit."""

from __future__ import annotations

import json
import os
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_model import build_chunks, in_ddp, logits_of, open_groups
from safetensors.torch import load_file, save_file
from tiny_models import LLAMA3_ROPE, VOCABULARY, make_folder, some_ids
from torch.utils._pytree import tree_map
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig

from rloop_mcore.actor import parallel
from rloop_mcore.config import LayoutConfig
from rloop_mcore.errors import UserError
from rloop_mcore.weights import gather
from rloop_mcore.weights.bridge import HfBridge, _named_parameters
from rloop_mcore.weights.digest import digest_of
from rloop_mcore.weights.family import HfTensor, Parameter, Split
from rloop_mcore.weights.gather import ScatteredTensor


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    open_groups(LayoutConfig())
    yield
    parallel.destroy()


def load(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[HfBridge, list[torch.nn.Module]]:
    bridge = HfBridge(folder)
    chunks = build_chunks(bridge.architecture(), LayoutConfig(), dtype)
    bridge.load(chunks, folder)
    return bridge, chunks


@torch.no_grad()
def assert_same_logits(chunks: list[torch.nn.Module], reference: torch.nn.Module) -> None:
    ids = some_ids()
    logits = logits_of(chunks, LayoutConfig(), ids)
    torch.testing.assert_close(logits[..., :VOCABULARY], reference(ids).logits, rtol=0, atol=1e-4)


def assert_identical(exported: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert exported.keys() == expected.keys()
    for name, tensor in expected.items():
        assert exported[name].dtype == tensor.dtype
        assert torch.equal(exported[name], tensor), name


def gathered(tensors: Iterator[tuple[str, ScatteredTensor]]) -> dict[str, torch.Tensor]:
    return {name: tensor.gather().clone() for name, tensor in tensors}


def exported(bridge: HfBridge, chunks: list[torch.nn.Module], of: Any) -> Iterator[tuple[str, ScatteredTensor]]:
    """What `of` makes of the parameters, by HF name."""
    return gather.scattered(bridge._exported, {name: of(p) for name, p in _named_parameters(chunks).items()})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("ratio", [1, 4, 7])
@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral", "qwen3", "qwen3_moe"])
def test_logits_and_round_trip(tmp_path: Path, family: str, ratio: int, tied: bool) -> None:
    reference = make_folder(tmp_path / f"{family}{ratio}", family, kv_heads=2, ratio=ratio, tied=tied)
    bridge, chunks = load(tmp_path / f"{family}{ratio}")
    assert_same_logits(chunks, reference)
    assert_identical(gathered(bridge.export(chunks)), load_file(tmp_path / f"{family}{ratio}" / "model.safetensors"))


def test_router_weights_that_do_not_sum_to_one(tmp_path: Path) -> None:
    reference = make_folder(tmp_path / "m", "qwen3_moe", kv_heads=1, ratio=2, tied=True, norm_topk_prob=False)
    _, chunks = load(tmp_path / "m")
    assert_same_logits(chunks, reference)


def test_num_experts_as_the_hub_writes_it(tmp_path: Path) -> None:
    make_folder(tmp_path / "m", "qwen3_moe", kv_heads=1, ratio=1, tied=True, num_hidden_layers=1)
    expected = HfBridge(tmp_path / "m").architecture()
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    config["num_experts"] = config.pop("num_local_experts", 4)  # the name of transformers from 5.1 or so on
    file.write_text(json.dumps(config))
    assert HfBridge(tmp_path / "m").architecture() == expected
    assert expected["transformer"]["num_moe_experts"] == 4


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe"])
def test_gradients_by_hf_name(tmp_path: Path, family: str) -> None:
    reference = make_folder(tmp_path / "m", family, kv_heads=2, ratio=2, tied=True)
    bridge, chunks = load(tmp_path / "m")
    ids = some_ids()
    weights = torch.randn(*ids.shape, VOCABULARY, generator=torch.Generator().manual_seed(1))
    (logits_of(chunks, LayoutConfig(), ids)[..., :VOCABULARY] * weights).sum().backward()
    (reference(ids).logits * weights).sum().backward()
    for parameter in reference.parameters():
        parameter.data = parameter.grad
    reference.save_pretrained(tmp_path / "gradients")  # transformers names and splits them
    expected = load_file(tmp_path / "gradients" / "model.safetensors")
    gradients = gathered(exported(bridge, chunks, lambda parameter: parameter.grad))
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-5 * expected[name].abs().max().item())


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 123456.0}, LLAMA3_ROPE])
def test_rope_settings_of_new_and_old_config_files(tmp_path: Path, rope: dict) -> None:
    reference = make_folder(tmp_path / "m", "llama", kv_heads=1, ratio=4, tied=True, rope_parameters=rope)
    _, chunks = load(tmp_path / "m")
    assert_same_logits(chunks, reference)

    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    scaling = {key: value for key, value in config.pop("rope_parameters").items() if key != "rope_theta"}
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None if rope["rope_type"] == "default" else scaling}
    file.write_text(json.dumps(config))
    _, chunks = load(tmp_path / "m")
    assert_same_logits(chunks, reference)


def test_ddp_wrapped_bf16_saves_what_it_loaded(tmp_path: Path) -> None:
    make_folder(tmp_path / "m", "qwen2", kv_heads=2, ratio=4, tied=False, dtype=torch.bfloat16)
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    bridge, chunks = load(tmp_path / "m", torch.bfloat16)
    wrapped = in_ddp(chunks)
    bridge.load(wrapped, tmp_path / "m")
    policy = bridge.save(bridge.export(wrapped), tmp_path / "out")
    assert_identical(*(load_file(tmp_path / name / "model.safetensors") for name in ("out", "m")))
    assert policy.path == tmp_path / "out"
    assert policy.digest == digest_of(tmp_path / "out") == digest_of(tmp_path / "m")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


class InFp8(torch.Tensor):
    """As Transformer Engine's Float8Tensor: it stands for a bf16 tensor, its slices do too, and it has no bytes."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> InFp8:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.bfloat16)

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values.to(torch.float8_e4m3fn)

    def dequantize(self) -> torch.Tensor:
        return self.values.bfloat16()

    def view(self, *shape: Any) -> InFp8:
        return InFp8(self.values.view(*shape))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = tree_map(lambda value: value.dequantize() if isinstance(value, InFp8) else value, (args, kwargs or {}))
        result = func(*plain[0], **plain[1])
        aten = torch.ops.aten
        kept = (aten.detach.default, aten.slice.Tensor, aten.view.default, aten._unsafe_view.default)
        return cls(result) if func in kept else result


def test_parameters_in_fp8_are_saved_in_the_dtype_they_stand_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron.core.fp8_utils.HAVE_TE_FP8_TENSOR_CLASS", True)
    monkeypatch.setattr("megatron.core.fp8_utils.FP8_TENSOR_CLASS", InFp8)
    make_folder(tmp_path / "m", "qwen2", kv_heads=2, ratio=4, tied=False, dtype=torch.bfloat16)
    bridge, chunks = load(tmp_path / "m", torch.bfloat16)
    fused = exported(bridge, chunks, lambda p: InFp8(p.detach()) if p.dim() == 2 else p)
    bridge.save(fused, tmp_path / "out")
    given = load_file(tmp_path / "m" / "model.safetensors")
    rounded = {n: t.to(torch.float8_e4m3fn).bfloat16() if t.dim() == 2 else t for n, t in given.items()}
    assert_identical(load_file(tmp_path / "out" / "model.safetensors"), rounded)


def test_saving_half_a_model_fails_and_leaves_nothing(tmp_path: Path) -> None:
    make_folder(tmp_path / "m", "llama", kv_heads=1, ratio=1, tied=True)
    bridge, chunks = load(tmp_path / "m")
    half = list(bridge.export(chunks))[:5]
    with pytest.raises(ValueError, match="tensors were not written"):
        bridge.save(iter(half), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("split", [Split.OUTPUT, Split.INPUT])
def test_a_tensor_that_is_not_wanted_takes_the_memory_of_a_chunk(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(gather, "_transfer", lambda operation, tensor, peer: taken.append((peer, tensor)))
    monkeypatch.setattr(gather, "_CHUNK_BYTES", 100)
    parameter = Parameter("p", (HfTensor("t", (64, 8)),), split)
    parts = [(rank, piece) for rank in range(2) for piece in parameter.pieces(rank, 2)]
    mine = torch.ones(parameter.shape(2))
    ScatteredTensor((64, 8), torch.float32, parts, mine, gather._Scratch(mine.device)).finish()
    assert sum(tensor.numel() for _, tensor in taken) == 64 * 8 / 2
    assert all(peer == 1 and tensor.untyped_storage().nbytes() <= 100 for peer, tensor in taken)


def test_a_rank_waits_for_each_chunk_that_it_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL would take all of them at once, and a write of the policy would have one collective's time."""
    done: list[str] = []
    stream = types.SimpleNamespace(synchronize=lambda: done.append("taken"))
    monkeypatch.setattr(gather, "_transfer", lambda operation, tensor, peer: done.append("sent"))
    monkeypatch.setattr(gather, "_directory", lambda *_: [gather._Entry([1], torch.float32)])
    monkeypatch.setattr(gather, "_CHUNK_BYTES", 1024)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    monkeypatch.setattr("torch.cuda.current_stream", lambda: stream)
    parameter = Parameter("p", (HfTensor("t", (64, 8)),), Split.REPLICATED)
    assert not list(gather.scattered([parameter], {"p": torch.ones(64, 8)}))
    assert done == ["sent", "taken"] * 2


def test_a_bad_folder_changes_no_parameter(tmp_path: Path) -> None:
    make_folder(tmp_path / "m", "llama", kv_heads=1, ratio=1, tied=False)
    bridge, chunks = load(tmp_path / "m")
    before = gathered(bridge.export(chunks))
    tensors = {name: tensor + 1 for name, tensor in load_file(tmp_path / "m" / "model.safetensors").items()}
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:, :-1].contiguous()
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(
        UserError, match=r"model\.safetensors: tensor lm_head\.weight has shape \[61, 7\], .* \[61, 8\]"
    ):
        bridge.load(chunks, tmp_path / "m")
    assert_identical(gathered(bridge.export(chunks)), before)


def test_weights_that_are_no_numbers_are_not_loaded(tmp_path: Path) -> None:
    make_folder(tmp_path / "m", "llama", kv_heads=1, ratio=1, tied=False)
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][1, 2] = float("nan")
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.up_proj\.weight holds NaN or infinity"):
        load(tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            r"architectures is \['GPT2LMHeadModel'\]; supported are Qwen2ForCausalLM",
        ),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'; only 'silu'"),
        ({"use_sliding_window": True}, "use_sliding_window is True; only False"),
        ({"attention_bias": True}, "attention_bias is True; only False"),
        ({"hidden_size": None}, "has no hidden_size"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling .*yarn.* is not supported"),
        ({"rope_parameters": LLAMA3_ROPE | {"low_freq_factor": 2.0}}, "rope scaling .* is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (
            {"rope_parameters": LLAMA3_ROPE, "original_max_position_embeddings": 4096},
            "rope scaling .*'original_max_position_embeddings': 4096.* is not supported",
        ),
        ({"rope_parameters": LLAMA3_ROPE | {"factor": None}}, "factor of the rope scaling is None; .* above 0"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta is '1e4'; it has to be a number above 0"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0; it has to be a number above 0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; it has to be a number above 0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling .*yarn.* is not supported"),
        ({"rope_scaling": {"rope_type": "default"}, "rope_theta": 5e5}, "rope_parameters .* rope_scaling .* differ"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, r"by kind of layer \(full_attention\) are not"),
        ({"is_causal": False}, "is_causal is False; only True"),  # attention to what comes after, for transformers
        ({"per_layer_config": {"0": {"rms_norm_eps": 0.1}}}, "per_layer_config is .*; only None"),
        ({"text_config": {"rms_norm_eps": 0.1}}, "text_config is .*; only None"),
    ],
)
def test_what_is_not_honoured_is_refused(tmp_path: Path, change: dict, sentence: str) -> None:
    make_folder(tmp_path / "m", "llama", kv_heads=1, ratio=1, tied=True, num_hidden_layers=1)
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=sentence):
        HfBridge(tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]; only \[\]"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2; only 1"),
        ({"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size is 8"),
        ({"attention_bias": True}, "attention_bias is True; only False"),
        ({"num_experts": None, "num_local_experts": None}, "has no num_local_experts"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5; it has to be a whole number from 1 to 4"),
        ({"num_experts_per_tok": 1}, "norm_topk_prob with num_experts_per_tok 1"),
    ],
)
def test_what_is_not_honoured_of_experts_is_refused(tmp_path: Path, change: dict, sentence: str) -> None:
    make_folder(tmp_path / "m", "qwen3_moe", kv_heads=1, ratio=1, tied=True, num_hidden_layers=1)
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=sentence):
        HfBridge(tmp_path / "m")


def test_mistral_with_kinds_of_layers_is_refused(tmp_path: Path) -> None:
    folder, kinds = tmp_path / "m", ["full_attention"]
    make_folder(folder, "mistral", kv_heads=1, ratio=1, tied=True, num_hidden_layers=1, layer_types=kinds)
    assert type(AutoModelForCausalLM.from_pretrained(folder)).__name__ == "MinistralForCausalLM"
    with pytest.raises(UserError, match=r"layer_types is \['full_attention'\]; only None"):
        HfBridge(folder)


def test_mistral_without_the_key_of_its_window_is_refused(tmp_path: Path) -> None:
    assert MistralConfig().sliding_window == 4096
    make_folder(tmp_path / "m", "mistral", kv_heads=1, ratio=1, tied=True, num_hidden_layers=1)
    HfBridge(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    del config["sliding_window"]
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="has no sliding_window, which transformers takes for 4096"):
        HfBridge(tmp_path / "m")


def test_family_by_name(tmp_path: Path) -> None:
    make_folder(tmp_path / "m", "llama", kv_heads=1, ratio=1, tied=True, num_hidden_layers=1)
    assert HfBridge(tmp_path / "m", "llama").architecture() == HfBridge(tmp_path / "m").architecture()
    with pytest.raises(UserError, match="one of auto, llama, mistral, qwen2, qwen3, qwen3_moe"):
        HfBridge(tmp_path / "m", "lama")
    make_folder(tmp_path / "n", "mistral", kv_heads=1, ratio=1, tied=True, num_hidden_layers=1, sliding_window=8)
    with pytest.raises(UserError, match=r"model.family is 'llama', and .*config.json is of mistral"):
        HfBridge(tmp_path / "n", "llama")


def test_a_policy_of_another_model_is_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "m", "llama", kv_heads=1, ratio=1, tied=True)
    make_folder(tmp_path / "n", "llama", kv_heads=1, ratio=1, tied=True, num_hidden_layers=2)
    bridge, chunks = load(tmp_path / "m")
    with pytest.raises(UserError, match="describes another model"):
        bridge.load(chunks, tmp_path / "n")


SMOLLM2 = Path(os.environ.get("RLOOP_SMOLLM2", "runs/smollm2/model"))


@pytest.mark.skipif(not (SMOLLM2 / "config.json").is_file(), reason=f"no {SMOLLM2}: tools/prepare_smollm2.py makes it")
@torch.no_grad()
def test_real_weights_have_transformers_logits() -> None:
    """SmolLM2-135M-Instruct in fp32, 9 heads on 3 KV heads, tied embeddings."""
    _, chunks = load(SMOLLM2)
    reference = LlamaForCausalLM(LlamaConfig.from_pretrained(SMOLLM2)).float()  # from_pretrained gives NaN on the shim
    reference.load_state_dict(load_file(SMOLLM2 / "model.safetensors"), strict=False)
    reference.tie_weights()
    ids = torch.randint(0, 49152, (2, 48), generator=torch.Generator().manual_seed(0))
    logits = logits_of(chunks, LayoutConfig(), ids)
    difference = (logits - reference(ids).logits).abs().max().item()
    print(f"max |difference| of logits: {difference:.2e}")
    assert difference < 1e-3
