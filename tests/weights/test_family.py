"""Splitting and merging against the layouts written out by hand, and that only what is needed is read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rloop_mcore.weights.family import HfTensor, Parameter, Split, canonical_name


class Counting:
    """A tensor that counts the elements sliced out of it, as a safetensors file would have to read them."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.read = 0

    def __getitem__(self, index: object) -> torch.Tensor:
        part = self.tensor[index]
        self.read += part.numel()
        return part


def shards(parameter: Parameter, tensors: dict, full_rows: int, ranks: int) -> list[torch.Tensor]:
    assert parameter.shape(ranks) == (full_rows // ranks, *parameter.sources[0].shape[1:])
    return [parameter.shard(tensors.__getitem__, rank, ranks) for rank in range(ranks)]


def test_qkv_interleaves_by_kv_head() -> None:
    q, k, v = torch.arange(8).reshape(8, 1), torch.arange(100, 104).reshape(4, 1), torch.arange(200, 204).reshape(4, 1)
    sources = (HfTensor("q", (8, 1)), HfTensor("k", (4, 1)), HfTensor("v", (4, 1)))
    qkv = Parameter("qkv", sources, Split.OUTPUT, groups=2)  # 4 query heads and 2 KV heads of 2
    first = [0, 1, 2, 3, 100, 101, 200, 201]
    second = [4, 5, 6, 7, 102, 103, 202, 203]
    tensors = {"q": q, "k": k, "v": v}
    assert [s.flatten().tolist() for s in shards(qkv, tensors, 16, 2)] == [first, second]
    assert [s.flatten().tolist() for s in shards(qkv, tensors, 16, 4)] == [first[:4], first[4:], second[:4], second[4:]]


def test_gate_and_up_alternate_by_rank() -> None:
    fc1 = Parameter("fc1", (HfTensor("gate", (4, 1)), HfTensor("up", (4, 1))), Split.OUTPUT)
    tensors = {"gate": torch.arange(4).reshape(4, 1), "up": torch.arange(10, 14).reshape(4, 1)}
    assert [s.flatten().tolist() for s in shards(fc1, tensors, 8, 2)] == [[0, 1, 10, 11], [2, 3, 12, 13]]
    assert [s.flatten().tolist() for s in shards(fc1, tensors, 8, 1)] == [[0, 1, 2, 3, 10, 11, 12, 13]]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_vocabulary_is_padded_with_zeros(ranks: int) -> None:
    embedding = Parameter("embedding", (HfTensor("e", (5, 2)),), Split.VOCABULARY)
    table = torch.randn(5, 2)
    padded = -(-5 // ranks) * ranks
    parts = shards(embedding, {"e": table}, padded, ranks)
    assert torch.equal(torch.cat(parts), torch.cat([table, torch.zeros(padded - 5, 2)]))
    assert torch.equal(embedding.merge(parts)[0], table)


@given(
    kv_heads=st.sampled_from([1, 2, 3, 4]),
    ratio=st.integers(1, 7),
    head_dim=st.sampled_from([2, 4]),
    factor=st.integers(1, 4),
    fewer=st.booleans(),
    bias=st.booleans(),
)
def test_qkv_round_trip(kv_heads: int, ratio: int, head_dim: int, factor: int, fewer: bool, bias: bool) -> None:
    rows = [kv_heads * ratio * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    ranks = next(n for n in range(factor, 0, -1) if kv_heads % n == 0)
    if fewer and sum(rows) % (kv_heads * factor) == 0:
        ranks = kv_heads * factor  # more ranks than KV heads
    sources = tuple(HfTensor(name, (n,) if bias else (n, 3)) for name, n in zip("qkv", rows, strict=True))
    tensors = {source.name: Counting(torch.randn(source.shape)) for source in sources}
    qkv = Parameter("qkv", sources, Split.OUTPUT, groups=kv_heads)
    parts = shards(qkv, tensors, sum(rows), ranks)
    for source, merged in zip(sources, qkv.merge(parts), strict=True):
        assert torch.equal(merged, tensors[source.name].tensor)
    assert all(tensors[source.name].read == tensors[source.name].tensor.numel() for source in sources)


@pytest.mark.parametrize("split", [Split.INPUT, Split.OUTPUT, Split.VOCABULARY])
def test_a_rank_reads_only_its_part(split: Split) -> None:
    parameter = Parameter("p", (HfTensor("w", (8, 8)),), split)
    source = Counting(torch.randn(8, 8))
    shard = parameter.shard(lambda name: source, rank=2, ranks=4)
    expected = source.tensor[:, 4:6] if split is Split.INPUT else source.tensor[4:6]
    assert torch.equal(shard, expected)
    assert source.read == 16


def test_transformer_engine_names_are_the_local_ones() -> None:
    layer = "decoder.layers.3."
    assert canonical_name(f"{layer}self_attention.linear_qkv.layer_norm_weight") == f"{layer}input_layernorm.weight"
    assert canonical_name(f"{layer}mlp.linear_fc1.layer_norm_weight") == f"{layer}pre_mlp_layernorm.weight"
    assert canonical_name(f"{layer}mlp.linear_fc1.weight") == f"{layer}mlp.linear_fc1.weight"


def test_layers_and_experts_are_numbered_over_the_whole_model() -> None:
    experts = "decoder.layers.1.mlp.experts."
    globally = "decoder.layers.5.mlp.experts.local_experts.11.linear_fc1.weight"
    for name in (f"{experts}local_experts.3.linear_fc1.weight", f"{experts}linear_fc1.weight3"):  # local, grouped GEMM
        assert canonical_name(name, first_layer=4, first_expert=8) == globally
    own = "decoder.layers.1.pre_mlp_layernorm.weight"
    assert canonical_name(own, first_layer=4, first_expert=8) == own.replace("1", "5")
    assert canonical_name("output_layer.weight", 4, 8) == "output_layer.weight"
