"""Sharded logprobs, and a rank that follows another, on two ranks: `worker_pieces.py OUT`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from rloop_mcore import platform

platform.setup("cpu", 1)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from rloop_mcore.actor import parallel  # noqa: E402
from rloop_mcore.actor.conduct import Conducted, collective  # noqa: E402
from rloop_mcore.actor.logprobs import token_logprobs  # noqa: E402
from rloop_mcore.config import LayoutConfig  # noqa: E402

TOKENS, VOCABULARY, PADDED, TEMPERATURE = 6, 9, 10, 0.7


class Adder(Conducted):
    """Adds over the ranks; `seen` counts the collective calls this rank took part in."""

    seen = 0

    @collective
    def total(self, value: float) -> float:
        self.seen += 1
        summed = torch.tensor(value)
        dist.all_reduce(summed)
        return float(summed)

    @collective
    def stream(self, count: int) -> Iterator[float]:
        for i in range(count):
            summed = torch.tensor(float(i))
            dist.all_reduce(summed)
            self.seen += 1
            yield float(summed)


def conducted() -> dict[str, object]:
    adder = Adder(timeout_s=60.0)
    results: dict[str, object] = {}
    if dist.get_rank() == 0:
        results = {"total": adder.total(2.5), "stream": list(adder.stream(3))}
        adder.close()
    else:
        adder.follow()
    seen: list[int] = [0, 0]
    dist.all_gather_object(seen, adder.seen)
    return results | {"seen": seen}


def logprobs() -> dict[str, torch.Tensor]:
    """Rank r holds columns [5r, 5r + 5) of the padded logits; the last column is padding."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(TOKENS, PADDED, generator=generator) * 20
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    weights = torch.randn(TOKENS, generator=generator)
    shard = whole.chunk(2, dim=-1)[dist.get_rank()].clone().requires_grad_()
    values, entropy = token_logprobs(shard, targets, VOCABULARY, TEMPERATURE)
    (values * weights).sum().backward()
    gradients = [torch.empty(TOKENS, PADDED // 2) for _ in range(2)]
    dist.all_gather(gradients, shard.grad)
    return {
        "logits": whole,
        "targets": targets,
        "weights": weights,
        "logprobs": values.detach(),
        "entropy": entropy,
        "gradient": torch.cat(gradients, -1),
    }


def main() -> None:
    parallel.initialize(LayoutConfig(tp=2), seed=0, timeout_s=60.0)
    result = {"logprobs": logprobs(), "conducted": conducted()}
    if dist.get_rank() == 0:
        torch.save(result, sys.argv[1])
    parallel.destroy()


if __name__ == "__main__":
    main()
