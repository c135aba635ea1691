"""The embedded engine's generation against transformers: same model, prompts and lengths, useful tokens a second.

Equal lengths: one batch of rows, all of one length. Spread lengths: four times as many samples as rows, whose lengths
are lognormal (sigma 0.8, median a quarter of the maximum) and cut at it, as a reasoning model's at the paper's 2,048
tokens: about a third of the maximum on average, about 4 % reach it. The maximum here is smaller, the shape the same.
transformers' `generate` runs batch after batch, each to its longest row; its continuous batching refills, as we do.
Every prompt is different: nothing is gained here from prompts that the samples of a group share.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Metric, arguments, at_least, random_qwen2, report
from transformers import ContinuousBatchingConfig, GenerationConfig, Qwen2ForCausalLM
from transformers.utils import logging

from rloop_mcore.rollout.embedded.engine import Engine
from rloop_mcore.rollout.embedded.generation import Generation
from rloop_mcore.rollout.embedded.model import CausalModel
from rloop_mcore.rollout.embedded.params import Sample, SamplingParams

PROMPT = 64
SIGMA, MEDIAN_SHARE = 0.8, 0.25
Run = Callable[[torch.Tensor, Sequence[int], int], object]  # prompts [samples, PROMPT], a length each, rows at once


def ours(model: CausalModel) -> Run:
    def run(prompts: torch.Tensor, lengths: Sequence[int], rows: int) -> None:
        params = {n: SamplingParams(max_new_tokens=n, ignore_eos=True) for n in set(lengths)}
        rows_of_ids = zip(prompts.tolist(), lengths, strict=True)
        samples = [Sample(tuple(ids), params[n], seed, "") for seed, (ids, n) in enumerate(rows_of_ids)]
        engine, call = Engine(model, rows), Generation(model, samples)
        engine.add(call)
        engine.advance("0", lambda: False)
        assert call.lengths.tolist() == list(lengths)

    return run


def generate(model: Qwen2ForCausalLM, **cache: Any) -> Run:
    @torch.inference_mode()
    def run(prompts: torch.Tensor, lengths: Sequence[int], rows: int) -> None:
        for begin in range(0, len(prompts), rows):
            part, longest = prompts[begin : begin + rows], max(lengths[begin : begin + rows])
            model.generate(
                part,
                attention_mask=torch.ones_like(part),
                max_new_tokens=longest,
                min_new_tokens=longest,
                do_sample=True,
                top_k=0,
                pad_token_id=0,
                **cache,
            )

    return run


def continuous(model: Qwen2ForCausalLM) -> Run:
    """transformers' own continuous batching, its pages sized to what the rows can need."""

    def run(prompts: torch.Tensor, lengths: Sequence[int], rows: int) -> None:
        pages = rows * (1 + (PROMPT + max(lengths)) // 256)
        manager = model.continuous_batching_context_manager(
            GenerationConfig(do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                num_blocks=pages, max_batch_tokens=512, max_requests_per_batch=rows, use_cuda_graph=False
            ),
            warmup=False,
        )
        with manager as running:
            for ids, length in zip(prompts.tolist(), lengths, strict=True):
                running.add_request(ids, max_new_tokens=length)
            done = 0
            while done < len(prompts):
                result = running.get_result(timeout=60)
                assert result is not None, "continuous batching stands still"
                if result.is_finished():
                    assert result.error is None, result.error
                    done += 1

    return run


def spread(samples: int, longest: int) -> list[int]:
    drawn = np.random.default_rng(0).lognormal(np.log(MEDIAN_SHARE * longest), SIGMA, samples)
    return [int(n) for n in np.clip(drawn.round(), 1, longest)]


def against_the_best(
    name: str, goal: float, runs: dict[str, Run], lengths: Sequence[int], rows: int, repeats: int
) -> Metric:
    """The first of `runs` against the fastest of the others: medians of runs that alternate, after one of each."""
    prompts = torch.randint(1, 4096, (len(lengths), PROMPT), generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    for repeat in range(1 + repeats):
        for label, run in runs.items():
            start = time.perf_counter()
            run(prompts, lengths, rows)
            if repeat:  # the first pays for set-up and for the memory
                seconds[label].append(time.perf_counter() - start)
    medians = {label: statistics.median(times) for label, times in seconds.items()}
    for label, median in medians.items():
        print(f"{name}: {label:22} {sum(lengths) / median:8.0f} tokens/s ({median:.2f} s)")
    mine, *others = medians
    best = min(others, key=lambda label: medians[label])
    return at_least(name, medians[best] / medians[mine], goal, f"transformers {best}")


def main() -> None:
    options = arguments(__doc__ or "")
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        model = random_qwen2(path, options.quick).eval()
        engine = CausalModel(path, torch.float32, "cpu")
    runs = {
        "ours": ours(engine),
        "generate": generate(model),
        "generate, static cache": generate(model, cache_implementation="static"),
        "continuous batching": continuous(model),
    }
    rows, tokens, longest, repeats = (32, 32, 64, 3) if options.quick else (48, 64, 128, 3)
    equal = against_the_best("engine_vs_generate_equal", 0.9, runs, [tokens] * rows, rows, repeats)
    rows //= 2
    lengths = spread(4 * rows, longest)
    print(f"spread: {len(lengths)} samples, mean {np.mean(lengths) / longest:.2f} of {longest} tokens, {rows} rows")
    uneven = against_the_best("engine_vs_generate_spread", 1.5, runs, lengths, rows, repeats)
    report("engine", [equal, uneven], options.json)


if __name__ == "__main__":
    main()
