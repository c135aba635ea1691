"""Sharded logprobs, and a rank that follows another, on two ranks: `worker_pieces.py OUT`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

from rloop_mcore import platform

platform.setup("cpu", 1)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

from rloop_mcore.actor import logprobs, parallel  # noqa: E402
from rloop_mcore.actor.conduct import Conducted, collective  # noqa: E402
from rloop_mcore.config import LayoutConfig  # noqa: E402
from rloop_mcore.errors import DiskFull  # noqa: E402

TOKENS, HIDDEN, VOCABULARY, PADDED, TEMPERATURE = 10, 3, 9, 10, 0.7


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

    @collective
    def save(self) -> None:
        self.seen += 1
        raise DiskFull("no space")


def said(call: Callable[[], object]) -> str:
    try:
        return f"no mistake: {call()}"
    except (TypeError, DiskFull) as error:
        return str(error)


def conducted() -> dict[str, object]:
    adder = Adder(timeout_s=60.0)
    results: dict[str, object] = {}
    if dist.get_rank() == 0:
        results = {"said": [said(lambda: adder.total(value=1.0)), said(adder.save)]}
        results |= {"total": adder.total(2.5), "stream": list(adder.stream(3))}
        adder.close()
    else:
        adder.follow()
    seen: list[int] = [0, 0]
    dist.all_gather_object(seen, adder.seen)
    return results | {"seen": seen}


def policy_logprobs(kept: int, of_entropy: float, vocabulary: int) -> dict[str, torch.Tensor]:
    """Rank r holds rows [5r, 5r + 5) of the padded output layer; those from `vocabulary` on are padding.

    `kept`: so many logits are computed once and kept; of more, four tokens a chunk: two whole ones and a rest.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    whole = torch.randn(PADDED, HIDDEN, generator=generator) * 5
    targets = torch.randint(vocabulary, (TOKENS,), generator=generator)
    weights = torch.randn(2, TOKENS, generator=generator) * torch.tensor([[1.0], [of_entropy]])
    group = parallel_state.get_tensor_model_parallel_group()
    shard = whole.chunk(2)[dist.get_rank()].clone().requires_grad_()
    mine = hidden.clone().requires_grad_()
    logprobs.KEPT_LOGITS, logprobs.CHUNK_LOGITS["cpu"] = kept, 4 * len(shard)
    values, entropy = logprobs.token_logprobs(mine, shard, targets, vocabulary, TEMPERATURE, group)
    loss = (values * weights[0]).sum()
    (loss + (entropy * weights[1]).sum() if of_entropy else loss).backward()
    of_weight = [torch.empty_like(shard) for _ in range(2)]
    dist.all_gather(of_weight, shard.grad)
    dist.all_reduce(mine.grad)
    return {
        "hidden": hidden,
        "weight": whole,
        "targets": targets,
        "weights": weights,
        "logprobs": values.detach(),
        "entropy": entropy.detach(),
        "of_hidden": mine.grad,
        "of_weight": torch.cat(of_weight),
    }


def main() -> None:
    parallel.initialize(LayoutConfig(tp=2), seed=0, timeout_s=60.0)
    ways = [(kept, of_entropy, VOCABULARY) for kept in (0, 1000) for of_entropy in (0.0, 1.0)] + [(0, 1.0, 4)]
    result = {"logprobs": [policy_logprobs(*way) for way in ways], "conducted": conducted()}
    if dist.get_rank() == 0:
        torch.save(result, sys.argv[1])
    parallel.destroy()


if __name__ == "__main__":
    main()
