"""Training speed on one GPU: Qwen2.5's shapes, rows of 4,096 tokens; bf16 against each FP8 recipe and transformers.

Weights are random and made in place, so no checkpoint is written or read. Each measurement is a process of its own, so
that all of them get the whole memory. Goals are ratios in one run; tokens/s and MFU are printed beside them.

python tools/bench/gpu_actor.py [SHAPE ...] [--json OUT] [--quick] [--trace OUT.json.gz]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from common import Metric, at_least, report
from transformers import Qwen2Config, Qwen2ForCausalLM

if TYPE_CHECKING:
    from rloop_mcore.protocols import ScatteredTensors
    from rloop_mcore.types import Policy

PEAK_FLOPS = 989e12  # dense bf16 of an H100 or H200 SXM (NVIDIA's datasheet), for FP8 runs too
RECIPES = ("fp8_delayed", "fp8_tensorwise", "fp8_blockwise")  # mxfp8 needs Blackwell
BASELINES = ("transformers, 1", "transformers, 4")  # rows a micro-batch; the faster one counts
TOKENS, ROWS, PROMPT, REPEATS, DEADLINE_S = 4096, 8, 256, 5, 600
MODEL = {
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "eos_token_id": 0,
    "bos_token_id": None,
}
# The sizes of Qwen2.5's config.json files. At 18 bytes a parameter (bf16, fp32 main weight and gradient, two fp32
# moments) 7.6 B of them come to 137 GB, so 7B runs with half of its layers.
SHAPES: dict[str, dict[str, Any]] = {
    "0.5B": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "7B-half": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 14,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
MICRO_BATCH_ROWS = {"0.5B": 4, "1.5B": 4, "7B-half": 2}  # ours


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)}; all of them")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--quick", action="store_true", help="the first shape only")
    parser.add_argument("--trace", type=Path, metavar="OUT", help="Perfetto trace of one bf16 step of the first shape")
    parser.add_argument("--measure", metavar="WAY", help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_actor needs a CUDA device and Transformer Engine (docs/gpu.md): torch sees no CUDA device here.")
        raise SystemExit(77)
    if options.measure:
        print(json.dumps(measure(options.shapes[0], options.measure, options.trace)))
        return
    shapes = options.shapes or list(SHAPES)[: 1 if options.quick else None]
    metrics: list[Metric] = []
    figures: list[dict[str, Any]] = []
    for shape in shapes:
        found: dict[str, dict[str, Any]] = {}
        for way in ("bf16", *RECIPES, *BASELINES):
            trace = options.trace if shape == shapes[0] and way == "bf16" else None
            result = in_own_process(shape, way, trace)
            if result is not None:
                found[way] = result
                figures.append({"shape": shape, "way": way} | result)
        metrics += ratios(shape, {way: result["tokens_per_s"] for way, result in found.items()})
    report("gpu_actor", metrics, options.json, {"gpu": torch.cuda.get_device_name(), "figures": figures})


def ratios(shape: str, speed: dict[str, float]) -> list[Metric]:
    """Of the ways that ran: each FP8 recipe over bf16, bf16 over the faster baseline. The goals are for 7B."""
    found = []
    for recipe in RECIPES:
        if recipe in speed and "bf16" in speed:
            value = speed[recipe] / speed["bf16"]
            found.append(at_least(f"fp8_vs_bf16 {recipe} ({shape})", value, 1.25, f"bf16, {TOKENS} tokens a row"))
    baselines = [speed[way] for way in BASELINES if way in speed]
    if baselines and "bf16" in speed:
        value = speed["bf16"] / max(baselines)
        baseline = "transformers, bf16, SDPA, torch's fused AdamW"
        found.append(at_least(f"gpu_train_vs_hf ({shape})", value, 1.3, baseline))
    return found


def in_own_process(shape: str, way: str, trace: Path | None) -> dict[str, Any] | None:
    """What `measure` found; prints a line. None where it failed, with the end of what it said."""
    command = [sys.executable, __file__, shape, "--measure", way]
    command += ["--trace", str(trace)] if trace else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    if done.returncode != 0:
        print(f"{shape:20} {way:16} failed: {done.stderr[-600:]}", flush=True)
        return None
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{shape:20} {way:16} {result['tokens_per_s']:9.0f} tokens/s  "
        f"MFU {result['mfu']:.3f} (of {PEAK_FLOPS / 1e12:.0f} TFLOP/s)  "
        f"peak {result['peak_gib']:.1f} GiB  loss {result['loss']:.3f}",
        flush=True,
    )
    return result


def measure(shape: str, way: str, trace: Path | None) -> dict[str, float]:
    """One policy's update of `ROWS` packed rows: {"tokens_per_s", "mfu", "peak_gib", "loss"}."""
    config = Qwen2Config(**(MODEL | SHAPES[shape]), architectures=["Qwen2ForCausalLM"])
    torch.manual_seed(0)
    ids = torch.randint(config.vocab_size, (ROWS, TOKENS + 1)).tolist()
    if way in BASELINES:
        update = transformers_update(config, ids, int(way.split()[-1]))
    else:
        update = actor_update(config, ids, way, MICRO_BATCH_ROWS[shape])
    for _ in range(2):
        update()
    torch.cuda.synchronize()
    if trace is not None:
        with torch.profiler.profile() as profile:
            update()
            torch.cuda.synchronize()
        profile.export_chrome_trace(str(trace))
    seconds, loss = [], 0.0
    for _ in range(REPEATS):
        start = time.perf_counter()
        loss = update()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    speed = ROWS * TOKENS / statistics.median(seconds)
    flops = speed * flops_per_token(config)
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"tokens_per_s": speed, "mfu": flops / PEAK_FLOPS, "peak_gib": peak, "loss": loss}


def flops_per_token(config: Qwen2Config) -> float:
    """Forward and backward: 6 N + 6 L s d (PaLM, arXiv 2204.02311, appendix B; its 12 L s d halved, as causal).

    N: the weights of all matrices, without the embedding; L layers of width d, rows of s tokens. The output layer
    counts for the response's tokens, where it is needed, and once, though its logits are computed again going backward.
    """
    d, layers = config.hidden_size, config.num_hidden_layers
    key_value = d * config.num_key_value_heads // config.num_attention_heads
    matrices = layers * (2 * d * d + 2 * d * key_value + 3 * d * config.intermediate_size)
    matrices += d * config.vocab_size * (TOKENS + 1 - PROMPT) / TOKENS
    return 6.0 * matrices + 6.0 * layers * TOKENS * d


class RandomWeights:
    """A `WeightBridge` that needs no files: every matrix is drawn in place, norms are one and biases zero."""

    def __init__(self, architecture: dict[str, Any]) -> None:
        self._architecture = architecture

    def architecture(self) -> dict[str, Any]:
        return self._architecture

    @torch.no_grad()
    def load(self, chunks: Sequence[torch.nn.Module], path: Path) -> None:
        for chunk in chunks:
            for name, parameter in chunk.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.02)
                else:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)

    def export(self, chunks: Sequence[torch.nn.Module]) -> ScatteredTensors:
        raise NotImplementedError("a benchmark's weights go nowhere")

    def save(self, tensors: ScatteredTensors, path: Path) -> Policy:
        raise NotImplementedError("a benchmark's weights go nowhere")


def actor_update(
    config: Qwen2Config, ids: list[list[int]], precision: str, micro_batch_rows: int
) -> Callable[[], float]:
    from rloop_mcore import platform

    platform.setup("cuda")
    from rloop_mcore.actor.actor import MegatronActor
    from rloop_mcore.config import ActorConfig, Config, OptimizerConfig
    from rloop_mcore.types import Example
    from rloop_mcore.weights import qwen2
    from rloop_mcore.weights.family import HfConfig

    architecture = qwen2.FAMILY.architecture(HfConfig(Path("Qwen2.5"), config.to_dict()))
    settings = Config(precision=precision, actor=ActorConfig(micro_batch_tokens=micro_batch_rows * TOKENS))
    actor = MegatronActor(settings, RandomWeights(architecture))
    actor.begin(Path("random"), OptimizerConfig(lr=1e-5), 1000)
    rows = [Example(tuple(row[:PROMPT]), tuple(row[PROMPT:])) for row in ids]
    return lambda: actor.fine_tune(rows, "token_mean")["loss"]


def transformers_update(config: Qwen2Config, ids: list[list[int]], micro_batch_rows: int) -> Callable[[], float]:
    """The same rows, bf16 with SDPA; AdamW on bf16 weights, which is less work than ours in fp32."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen2ForCausalLM._from_config(config, attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1, fused=True)
    rows = torch.tensor(ids, device="cuda")

    def update() -> float:
        optimizer.zero_grad()
        total = 0.0
        for part in rows.split(micro_batch_rows):
            logits = model(input_ids=part[:, :-1], logits_to_keep=TOKENS + 1 - PROMPT).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), part[:, PROMPT:].flatten())
            loss = loss * len(part) / ROWS
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return total

    return update


if __name__ == "__main__":
    main()
