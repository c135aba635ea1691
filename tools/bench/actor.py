"""The Megatron actor on the CPU: one SFT update against transformers + AdamW, and the memory of the logprobs.

Both sides have the same weights, rows, loss and gradient clipping, in fp32. Rows are of equal length, or of the
spread that the paper's responses have (up to 2,048 tokens; a quarter of that here): ours packs them, transformers pads
them to the longest. `padding_share` is for the paper's own lengths on 8 replicas.
"""

from __future__ import annotations

import math
import multiprocessing
import random
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rloop_mcore import platform

platform.setup("auto")  # before Megatron is imported

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from common import (  # noqa: E402
    Metric,
    PeakMemory,
    arguments,
    at_least,
    at_most,
    random_qwen2,
    report,
    side_by_side,
)
from transformers import Qwen2ForCausalLM  # noqa: E402

from rloop_mcore.actor import parallel  # noqa: E402
from rloop_mcore.actor.actor import MegatronActor  # noqa: E402
from rloop_mcore.actor.logprobs import token_logprobs  # noqa: E402
from rloop_mcore.actor.packing import Row, Share, micro_batches, padding_share  # noqa: E402
from rloop_mcore.config import ActorConfig, Config, OptimizerConfig, RunConfig  # noqa: E402
from rloop_mcore.types import Example  # noqa: E402
from rloop_mcore.weights.bridge import HfBridge  # noqa: E402

OPTIMIZER = OptimizerConfig(lr=1e-5)
VOCABULARY, HIDDEN, TOKENS = 151_936, 448, 2048  # of the memory probe: Qwen2.5's vocabulary


def main() -> None:
    options = arguments((__doc__ or "").partition("\n")[0])
    rows, repeats = (8, 3) if options.quick else (16, 7)
    draw = random.Random(0)
    equal = examples(draw, [(32, 224)] * rows)
    spread = examples(draw, [(prompt // 4, response // 4) for prompt, response in paper_lengths(draw, rows)])
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        baseline = random_qwen2(model, options.quick)
        settings = ActorConfig(micro_batch_tokens=4096)
        actor = MegatronActor(Config(precision="fp32", run=RunConfig(dir=folder), actor=settings), HfBridge(model))
        actor.begin(model, OPTIMIZER, 1000)

    def ratio(batch: list[Example]) -> float:
        ours = partial(actor.fine_tune, batch, "token_mean")
        return side_by_side(ours, transformers_update(baseline, batch), repeats)

    of_equal, of_spread = ratio(equal), ratio(spread)
    actor.close()
    parallel.destroy()
    longest, mean = max(map(length, spread)), sum(map(length, spread)) / rows
    theirs = "transformers Qwen2 + torch's fused AdamW"
    report(
        "actor",
        [
            at_least("train_vs_hf_equal", of_equal, 1.0, f"{theirs}, {rows} rows of 256"),
            at_least("train_vs_hf_spread", of_spread, 1.5, f"{theirs}, padded: {rows} rows, {mean:.0f} of {longest}"),
            padding(),
            memory(),
        ],
        options.json,
    )


def paper_lengths(draw: random.Random, rows: int) -> list[tuple[int, int]]:
    """(prompt, response) tokens: prompts of 60 to 300, responses log-normal around 665, cut at 2,048."""
    return [(draw.randint(60, 300), min(2048, max(20, int(draw.lognormvariate(6.5, 0.6))))) for _ in range(rows)]


def examples(draw: random.Random, lengths: Sequence[tuple[int, int]]) -> list[Example]:
    """Random tokens of these lengths."""

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(4096) for _ in range(count))

    return [Example(tokens(prompt), tokens(response)) for prompt, response in lengths]


def length(example: Example) -> int:
    return len(example.prompt_ids) + len(example.response_ids)


def transformers_update(model: Qwen2ForCausalLM, batch: list[Example]) -> Callable[[], None]:
    """The same update with transformers: one padded batch, logits for the response tokens only."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=OPTIMIZER.lr, weight_decay=OPTIMIZER.weight_decay, fused=True)
    longest = max(map(length, batch))
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    attended, predicting = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, example in enumerate(batch):
        ids[row, : length(example)] = torch.tensor(example.prompt_ids + example.response_ids)
        attended[row, : length(example)] = 1
        predicting[row, len(example.prompt_ids) - 1 : length(example) - 1] = True
    padded = bool((attended == 0).any())
    inputs, mask, targets = ids[:, :-1], attended[:, :-1] if padded else None, ids[:, 1:][predicting[:, :-1]]

    def update() -> None:
        optimizer.zero_grad()
        hidden = model.model(input_ids=inputs, attention_mask=mask, use_cache=False).last_hidden_state
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[predicting[:, :-1]]), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_grad)
        optimizer.step()

    return update


def padding() -> Metric:
    """The share of padding in 512 of the paper's responses on 8 replicas, 16,384 tokens a micro-batch."""
    lengths = paper_lengths(random.Random(0), 512)
    rows = [Row(range(prompt), range(response)) for prompt, response in lengths]
    share = Share(ranks=8, multiple=16)
    value = padding_share(rows, micro_batches(rows, share), share)
    padded = 1.0 - sum(map(len, rows)) / (len(rows) * max(map(len, rows)))
    return at_most("padding_share", value, 0.03, f"{padded:.2f} with rows padded to the longest")


def memory() -> Metric:
    """Peak memory of logprobs and entropy, forward and backward, as a share of the way with whole logits."""
    peaks = {}
    for way in ("chunked", "naive"):
        with multiprocessing.get_context("spawn").Pool(1) as process:
            peaks[way] = process.apply(peak_bytes, (way,))
    shown = ", ".join(f"{way} {peak / 2**30:.2f} GiB" for way, peak in peaks.items())
    baseline = f"whole fp32 logits, {TOKENS} tokens, vocabulary {VOCABULARY}: {shown}"
    return at_most("logprob_memory_vs_naive", peaks["chunked"] / peaks["naive"], 0.25, baseline)


def peak_bytes(way: str) -> int:
    """What this process needs at most beyond the inputs; the gradients of both inputs count."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN).div_(math.sqrt(HIDDEN)).requires_grad_()
    targets = torch.randint(VOCABULARY, (TOKENS,))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    with PeakMemory() as memory:
        if way == "chunked":
            logprobs, entropy = token_logprobs(hidden, weight, targets, VOCABULARY, 1.0, group)
        else:
            log_p = (hidden @ weight.T).log_softmax(-1)
            logprobs, entropy = log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
        (logprobs.sum() + 0.1 * entropy.sum()).backward()
    return memory.extra


if __name__ == "__main__":
    main()
