"""The CPU's core attention against attention written out in float64, gradients included."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from naive_attention import cumulative, naive, packed_inputs
from ranks import launch

from rloop_mcore import platform

platform.setup("cpu", threads=1)

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from worker_cp import GROUPS, HEADS, LENGTHS  # noqa: E402

from rloop_mcore.platform.attention import CausalAttention  # noqa: E402

HERE = Path(__file__).parent
equal = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


def attend(lengths: list[int], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output and gradients of one packed call."""
    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4)
    query, key, value = (x.clone().requires_grad_() for x in inputs[:3])
    packing = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cumulative(lengths), cu_seqlens_kv=cumulative(lengths))
    output = CausalAttention(config)(query, key, value, None, packed_seq_params=packing)
    output.backward(inputs[3])
    return [output.detach(), query.grad, key.grad, value.grad]


@pytest.mark.parametrize("share", [1, 4, 7])
@pytest.mark.parametrize("lengths", [[6, 6, 6], [9, 5, 5, 1, 12], [4]], ids=["equal", "ragged", "one"])
def test_packed_is_attention_within_each_sequence(lengths: list[int], share: int) -> None:
    inputs = packed_inputs(lengths, heads=2 * share, groups=2)
    for ours, reference in zip(attend(lengths, inputs), naive(lengths, *inputs), strict=True):
        equal(ours, reference)


def test_an_empty_sequence_changes_nothing() -> None:
    inputs = packed_inputs([3, 5], heads=2, groups=1)
    for with_empty, without in zip(attend([3, 0, 5, 0], inputs), attend([3, 5], inputs), strict=True):
        assert torch.equal(with_empty, without)


def test_rows_of_a_batch_are_sequences_of_one_length() -> None:
    inputs = packed_inputs([5, 5, 5], heads=4, groups=2)
    query, key, value, _ = (x.unflatten(0, (3, 5)).transpose(0, 1) for x in inputs)
    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4)
    output = CausalAttention(config)(query, key, value, None)
    equal(output.transpose(0, 1).flatten(0, 1), naive([5, 5, 5], *inputs)[0])


def test_the_scale_is_the_one_asked_for() -> None:
    inputs = packed_inputs([7], heads=2, groups=1)
    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4)
    packing = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cumulative([7]), cu_seqlens_kv=cumulative([7]))
    output = CausalAttention(config, softmax_scale=0.5)(*inputs[:3], None, packed_seq_params=packing)
    inputs[0] = inputs[0] * 0.5 * inputs[0].size(2) ** 0.5
    equal(output, naive([7], *inputs)[0])


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[torch.Tensor]]:
    out = tmp_path_factory.mktemp("cp") / "out.pt"
    launch(HERE / "worker_cp.py", out, processes=4, timeout_s=200)
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("cp", [2, 4])
def test_context_parallel_ranks_hold_the_same_attention(split: dict[int, list[torch.Tensor]], cp: int) -> None:
    reference = attend(LENGTHS, packed_inputs(LENGTHS, HEADS, GROUPS))
    for ours, whole in zip(split[cp], reference, strict=True):
        equal(ours, whole)
