"""Packed attention split over 2 and 4 context-parallel ranks: `worker_cp.py OUT` in four processes."""

from __future__ import annotations

import sys

from rloop_mcore import platform

platform.setup("cpu", threads=1)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from naive_attention import cumulative, packed_inputs, zigzag  # noqa: E402

from rloop_mcore.platform.attention import CausalAttention  # noqa: E402

LENGTHS, HEADS, GROUPS = [24, 16, 16, 16, 8, 8, 32, 8], 4, 2


def main(out: str) -> None:
    dist.init_process_group("gloo")
    results = {}
    for cp in (2, 4):
        parallel_state.initialize_model_parallel(context_parallel_size=cp)
        results[cp] = attend(cp)
        parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        torch.save(results, out)
    dist.destroy_process_group()


def attend(cp: int) -> list[torch.Tensor]:
    """The output and the three gradients over the whole pack, put together from the ranks' shares."""
    group = parallel_state.get_context_parallel_group()
    held = [zigzag(LENGTHS, rank, cp) for rank in range(cp)]
    inputs = [x[held[group.rank()]] for x in packed_inputs(LENGTHS, HEADS, GROUPS)]
    query, key, value = (x.requires_grad_() for x in inputs[:3])
    config = TransformerConfig(
        num_layers=1, hidden_size=64, num_attention_heads=HEADS, num_query_groups=GROUPS, context_parallel_size=cp
    )
    packing = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cumulative(LENGTHS), cu_seqlens_kv=cumulative(LENGTHS))
    output = CausalAttention(config)(query, key, value, None, packed_seq_params=packing)
    output.backward(inputs[3])
    return [whole(x, held, group) for x in (output.detach(), query.grad, key.grad, value.grad)]


def whole(share: torch.Tensor, held: list[list[int]], group: dist.ProcessGroup) -> torch.Tensor:
    shares = [torch.empty_like(share) for _ in held]
    dist.all_gather(shares, share.contiguous(), group=group)
    result = torch.empty(sum(LENGTHS), *share.shape[1:], dtype=share.dtype)
    for tokens, part in zip(held, shares, strict=True):
        result[tokens] = part
    return result


if __name__ == "__main__":
    main(sys.argv[1])
