"""What the benchmarks share: interleaved medians, the model they run on, and the JSON they write."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM


@dataclass(frozen=True)
class Metric:
    """One ratio against a named baseline, and whether it reaches its goal."""

    name: str
    value: float
    unit: str
    goal: str
    baseline: str
    met: bool


def at_least(name: str, value: float, goal: float, baseline: str) -> Metric:
    """A ratio of speeds that should be `goal` or more."""
    return Metric(name, round(value, 3), "x", f">= {goal}", baseline, value >= goal)


def at_most(name: str, value: float, goal: float, baseline: str) -> Metric:
    """A share of what the baseline needs that should be `goal` or less."""
    return Metric(name, round(value, 4), "x", f"<= {goal}", baseline, value <= goal)


def arguments(description: str) -> argparse.Namespace:
    """`--json OUT` and `--quick` (fewer repeats, a smaller model)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--quick", action="store_true", help="fewer repeats and a smaller model")
    return parser.parse_args()


def side_by_side(ours: Callable[[], object], baseline: Callable[[], object], repeats: int) -> float:
    """Median seconds of the baseline over median seconds of ours; runs alternate, so that noise hits both."""
    for run in (ours, baseline) * 3:  # the first calls pay for set-up and for the memory
        run()
    seconds: dict[Callable[[], object], list[float]] = {ours: [], baseline: []}
    for _ in range(repeats):
        for run in (ours, baseline):
            start = time.perf_counter()
            run()
            seconds[run].append(time.perf_counter() - start)
    return statistics.median(seconds[baseline]) / statistics.median(seconds[ours])


def memory_of_this_process(field: str) -> int:
    """Bytes, from /proc: VmRSS is what it holds, VmHWM the most it held, RssAnon what is no file's of what it holds."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


class PeakMemory:
    """How far this process's resident memory rises inside the block, in bytes. The kernel keeps count: a thread that
    looks now and then allocates memory in between, which the allocator of the trainer answers with new heap."""

    def __enter__(self) -> PeakMemory:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
        self._before = memory_of_this_process("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        self.extra = memory_of_this_process("VmHWM") - self._before


def even_length(text: str) -> bool:
    """The reward of `step_vs_trl.py`, here for both its environments: an even number of words."""
    return len(text.split()) % 2 == 0


def random_qwen2(folder: Path, quick: bool) -> Qwen2ForCausalLM:
    """A random Qwen2 of 20 M parameters (5 M with `quick`), fp32, written to `folder` as an HF folder too."""
    hidden, layers = (256, 4) if quick else (448, 6)
    return write_qwen2(folder, vocabulary=4096, hidden=hidden, layers=layers, kv_heads=1)


def write_qwen2(folder: Path, vocabulary: int, hidden: int, layers: int, kv_heads: int) -> Qwen2ForCausalLM:
    """A random Qwen2 of these sizes, fp32, whose heads are 64 wide, written to `folder` too."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=kv_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        eos_token_id=0,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    return model


def report(name: str, metrics: list[Metric], out: Path | None, more: Mapping[str, object] | None = None) -> None:
    """Print a line a metric; write the JSON that `make bench` reads, with `more` in it."""
    for metric in metrics:
        verdict = "met" if metric.met else "MISSED"
        print(f"{metric.name:28} {metric.value:8.3f} {metric.unit}  goal {metric.goal}: {verdict}  ({metric.baseline})")
    if out is not None:
        machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}"
        content = {"name": name, "machine": machine, "metrics": [asdict(metric) for metric in metrics]} | dict(
            more or {}
        )
        out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
