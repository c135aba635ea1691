"""The checksums expected of an engine: their formula, and SGLang's fusing, padding and splitting of tensors."""

from __future__ import annotations

import asyncio
import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from served_model import tile_checksum

from rloop_mcore.errors import Fault, UserError
from rloop_mcore.rollout.checksums import ExpectedChecksums, KeptWeights, difference
from rloop_mcore.rollout.client import EngineClient, EngineError
from rloop_mcore.rollout.hashers import TileHasher, embedded_hasher, sglang_cpu_hasher
from rloop_mcore.rollout.served import ServedModel, kept_weights
from rloop_mcore.rollout.sync import _verify


def _words(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 2**32, count, dtype=np.uint32)


@pytest.mark.parametrize("count", [1, 255, 8191, 8192, 8193, 3 * 8192, 100_000])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_the_tile_hash_is_its_formula_however_the_tensor_comes(count: int, parts: int) -> None:
    words = _words(count)
    hasher = TileHasher()
    for part in torch.from_numpy(words.view(np.int32)).chunk(parts):
        hasher.update(part)
    assert hasher.hexdigest() == tile_checksum(words)


def test_the_tile_hash_takes_its_words_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TileHasher, "_WORDS", 5000)
    words = _words(30_000)
    hasher = TileHasher()
    hasher.update(torch.from_numpy(words.view(np.int32)))
    assert hasher.hexdigest() == tile_checksum(words)


def test_the_tile_hash_of_nothing_and_of_odd_sizes() -> None:
    assert TileHasher().hexdigest() == "0" * 16
    with pytest.raises(ValueError, match="multiple of 4 bytes"):
        TileHasher().update(torch.zeros(3, dtype=torch.bfloat16))


def _sha(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def _expected(engine: KeptWeights, tensors: dict[str, torch.Tensor]) -> list[dict[str, str]]:
    checksums = ExpectedChecksums(engine)
    for name, tensor in tensors.items():
        checksums.add(name, tensor)
    return checksums.by_rank()


def _layer(heads: int, kv_heads: int) -> dict[str, torch.Tensor]:
    """The tensors of one layer of hidden size 8 and head size 4, in a checkpoint's order."""
    torch.manual_seed(0)
    place = "model.layers.0."
    return {
        f"{place}self_attn.q_proj.weight": torch.randn(heads * 4, 8),
        f"{place}self_attn.q_proj.bias": torch.randn(heads * 4),
        f"{place}self_attn.k_proj.weight": torch.randn(kv_heads * 4, 8),
        f"{place}self_attn.k_proj.bias": torch.randn(kv_heads * 4),
        f"{place}self_attn.v_proj.weight": torch.randn(kv_heads * 4, 8),
        f"{place}self_attn.v_proj.bias": torch.randn(kv_heads * 4),
        f"{place}self_attn.o_proj.weight": torch.randn(8, heads * 4),
        f"{place}mlp.gate_proj.weight": torch.randn(12, 8),
        f"{place}mlp.up_proj.weight": torch.randn(12, 8),
        f"{place}mlp.down_proj.weight": torch.randn(8, 12),
        f"{place}input_layernorm.weight": torch.randn(8),
    }


def test_the_embedded_engine_keeps_what_it_is_sent() -> None:
    (found,) = _expected(KeptWeights(embedded_hasher, fused=False), _layer(4, 2))
    assert found.keys() == _layer(4, 2).keys()


def test_fused_tensors_are_in_the_order_of_the_stream() -> None:
    tensors = _layer(4, 2)
    q, qb, k, kb, v, vb, o, gate, up, down, norm = tensors.values()
    (found,) = _expected(KeptWeights(sglang_cpu_hasher, fused=True, query_heads=4, kv_heads=2), tensors)
    place = "model.layers.0."
    assert found == {
        f"{place}self_attn.qkv_proj.weight": _sha(torch.cat([q, k, v])),
        f"{place}self_attn.qkv_proj.bias": _sha(torch.cat([qb, kb, vb])),
        f"{place}self_attn.o_proj.weight": _sha(o),
        f"{place}mlp.gate_up_proj.weight": _sha(torch.cat([gate, up])),
        f"{place}mlp.down_proj.weight": _sha(down),
        f"{place}input_layernorm.weight": _sha(norm),
    }


@pytest.mark.parametrize(("kv_heads", "kv_parts"), [(4, [0, 1, 2, 3]), (2, [0, 0, 1, 1]), (1, [0, 0, 0, 0])])
def test_four_ranks_share_a_layer(kv_heads: int, kv_parts: list[int]) -> None:
    """With fewer key and value heads than ranks, several ranks keep the same head."""
    tensors = _layer(4, kv_heads)
    q, _, k, _, v, _, o, gate, up, down, norm = tensors.values()
    ranks = _expected(KeptWeights(sglang_cpu_hasher, fused=True, tp=4, query_heads=4, kv_heads=kv_heads), tensors)
    place = "model.layers.0."
    for rank, (found, kv) in enumerate(zip(ranks, kv_parts, strict=True)):
        rows = slice(4 * kv, 4 * kv + 4)
        own = slice(4 * rank, 4 * rank + 4)
        third = slice(3 * rank, 3 * rank + 3)
        assert found[f"{place}self_attn.qkv_proj.weight"] == _sha(torch.cat([q[own], k[rows], v[rows]]))
        assert found[f"{place}self_attn.o_proj.weight"] == _sha(o[:, own])
        assert found[f"{place}mlp.gate_up_proj.weight"] == _sha(torch.cat([gate[third], up[third]]))
        assert found[f"{place}mlp.down_proj.weight"] == _sha(down[:, third])
        assert found[f"{place}input_layernorm.weight"] == _sha(norm)


@pytest.mark.parametrize(("tp", "rows"), [(1, 128), (2, 128), (3, 192)])
def test_the_vocabulary_is_padded_with_zeros(tp: int, rows: int) -> None:
    table = torch.randn(70, 8)
    padded = torch.cat([table, torch.zeros(rows - 70, 8)])
    ranks = _expected(KeptWeights(sglang_cpu_hasher, fused=True, tp=tp), {"model.embed_tokens.weight": table})
    assert [r["model.embed_tokens.weight"] for r in ranks] == [_sha(part) for part in padded.chunk(tp)]


def test_a_vocabulary_that_needs_no_padding_is_not_copied() -> None:
    taken: list[torch.Tensor] = []

    class Taking:
        def update(self, tensor: torch.Tensor) -> None:
            taken.append(tensor)

        def hexdigest(self) -> str:
            return ""

    table = torch.randn(128, 8)
    _expected(KeptWeights(Taking, fused=True, tp=2), {"model.embed_tokens.weight": table})
    assert [part.data_ptr() for part in taken] == [table.data_ptr(), table[64:].data_ptr()]


@pytest.mark.parametrize(("tp", "ep"), [(2, 2), (2, 1), (4, 2)])
def test_the_experts_of_a_layer_are_two_tensors(tp: int, ep: int) -> None:
    """Each expert parallel group has its own, and its ranks a part of each."""
    torch.manual_seed(1)
    place = "model.layers.0.mlp.experts."
    gate, up, down = torch.randn(4, 12, 8), torch.randn(4, 12, 8), torch.randn(4, 8, 12)
    tensors = {
        f"{place}{expert}.{kind}_proj.weight": tensor[expert]
        for expert in range(4)
        for kind, tensor in (("gate", gate), ("up", up), ("down", down))
    }
    engine = KeptWeights(sglang_cpu_hasher, fused=True, tp=tp, ep=ep, experts=4)
    sharing, owned = tp // ep, 4 // ep
    for rank, found in enumerate(_expected(engine, tensors)):
        group, place_in_it = divmod(rank, sharing)
        experts = slice(owned * group, owned * group + owned)
        width = slice(12 // sharing * place_in_it, 12 // sharing * (place_in_it + 1))
        assert found == {
            f"{place}w13_weight": _sha(torch.cat([gate[experts, width], up[experts, width]], dim=1)),
            f"{place}w2_weight": _sha(down[experts, :, width]),
        }


@pytest.mark.parametrize("head_split", [False, True])
def test_data_parallel_attention_splits_attention_and_embedding_within_a_group(head_split: bool) -> None:
    """Four ranks in two groups: ranks 0 and 2 keep the same half of the attention; the output layer is in quarters."""
    tensors = _layer(4, 2)
    q, _, k, _, v, _, o, gate, *_ = tensors.values()
    tensors |= {"model.embed_tokens.weight": torch.randn(64, 8), "lm_head.weight": torch.randn(64, 8)}
    engine = KeptWeights(sglang_cpu_hasher, fused=True, tp=4, dp=2, query_heads=4, kv_heads=2, head_split=head_split)
    place = "model.layers.0."
    for rank, found in enumerate(_expected(engine, tensors)):
        half, quarter = rank % 2, slice(3 * rank, 3 * rank + 3)
        parts = [tensor.chunk(2)[half] for tensor in (q, k, v)]
        assert found[f"{place}self_attn.qkv_proj.weight"] == _sha(torch.cat(parts))
        assert found[f"{place}self_attn.o_proj.weight"] == _sha(o.chunk(2, 1)[half])
        assert found["model.embed_tokens.weight"] == _sha(tensors["model.embed_tokens.weight"].chunk(2)[half])
        head = tensors["lm_head.weight"]
        assert found["lm_head.weight"] == _sha(head.chunk(2)[half] if head_split else head.chunk(4)[rank])
        up = tensors[f"{place}mlp.up_proj.weight"]
        assert found[f"{place}mlp.gate_up_proj.weight"] == _sha(torch.cat([gate[quarter], up[quarter]]))


@pytest.mark.parametrize(
    ("info", "groups"),
    [
        ({}, 1),
        ({"dp_size": 2, "enable_dp_attention": True}, 2),  # 0.5.17 to 0.5.21
        ({"dp_size": 1, "attn_dp_size": 2, "enable_dp_attention": True}, 2),  # from 0.5.22
        ({"dp_size": 1, "attn_dp_size": 1, "enable_dp_attention": False}, 1),
    ],
)
def test_the_groups_of_data_parallel_attention_are_read_from_each_version(info: dict[str, Any], groups: int) -> None:
    assert kept_weights({"version": "0.5.20", "tp_size": 4} | info, ServedModel(9), "http://a").dp == groups


@pytest.mark.parametrize(
    ("info", "fp8", "words"),
    [
        ({"dp_size": 2}, False, "http://a has --dp-size 2"),
        ({"dp_size": 2, "attn_dp_size": 2}, False, "--dp-size 2"),
        ({"pp_size": 2, "tp_size": 2}, False, "http://a has --pp-size 2"),
        ({"quantization": "fp8"}, False, "rollout.quantization=fp8"),
        ({"quantization": "awq"}, True, "--quantization awq"),
    ],
)
def test_servers_that_cannot_be_synced_are_refused(info: dict[str, Any], fp8: bool, words: str) -> None:
    with pytest.raises(Fault, match=words):
        kept_weights({"version": "0.5.23"} | info, ServedModel(9, fp8=fp8), "http://a")


def test_a_difference_is_one_sentence() -> None:
    assert difference({"a": "1"}, {"a": "1"}) is None
    found = difference({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "9", "d": "4"})
    assert found == "1 with other values (e.g. b) and 1 missing (e.g. c) and 1 that were not sent (e.g. d) of 3 tensors"


@pytest.mark.parametrize("ranks", [[], [0], [0, 2], [0, 1, 2]])
def test_an_engine_that_leaves_out_a_rank_is_not_verified(ranks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    sums = {"model.norm.weight": "0" * 16}

    async def checksums(client: EngineClient, timeout_s: float) -> list[tuple[int, dict[str, str]]]:
        return [(rank, sums) for rank in ranks]

    monkeypatch.setattr(EngineClient, "checksums", checksums)
    client = EngineClient("http://engine", None, vocabulary=10, generate_timeout_s=1.0)
    with pytest.raises(EngineError, match=r"http://engine: .* ranks .* has 2"):
        asyncio.run(_verify(client, [sums, sums], 1.0))


@pytest.mark.parametrize("ranks", [[0, 1], [0, 1, 0, 1]])  # twice: groups of data parallel attention
def test_every_rank_of_an_engine_is_verified(ranks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = {"model.norm.weight": "0" * 16}, {"model.norm.weight": "1" * 16}
    answer = [(rank, right) for rank in ranks]

    async def checksums(client: EngineClient, timeout_s: float) -> list[tuple[int, dict[str, str]]]:
        return answer

    monkeypatch.setattr(EngineClient, "checksums", checksums)
    client = EngineClient("http://engine", None, vocabulary=10, generate_timeout_s=1.0)
    asyncio.run(_verify(client, [right, right], 1.0))
    answer[-1] = (1, wrong)
    with pytest.raises(EngineError, match="http://engine: rank 1 does not hold the weights it was sent: 1 with other"):
        asyncio.run(_verify(client, [right, right], 1.0))


def test_a_served_model_is_what_config_json_says() -> None:
    config = {"vocab_size": 45, "num_attention_heads": 8, "num_key_value_heads": 2, "num_experts": 16}
    of = partial(ServedModel.of, folder=Path("/models/m"))
    assert of(config | {"torch_dtype": "bfloat16"}, fp8=True) == ServedModel(45, 8, 2, 16, "bfloat16", fp8=True)
    assert of({"vocab_size": 45, "num_attention_heads": 8}) == ServedModel(45, 8, 8, 1, "float32")
    other = {"num_experts": None, "num_local_experts": 4, "dtype": "half"}
    assert of(config | other) == ServedModel(45, 8, 2, 4, "half")
    for name in ("vocab_size", "num_attention_heads"):
        with pytest.raises(UserError, match=f"/models/m/config.json has no {name}: it is not the folder of a language"):
            of({key: value for key, value in config.items() if key != name})
