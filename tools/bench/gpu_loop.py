"""One RLoop iteration of a model of Qwen2.5-0.5B's shape on one GPU, engine included: what a step spends its time on.

The model is random and what it says is noise of 256 tokens; a coin grades it, so that every group has something to
learn from. The run is as any other. The ratio is the weight sync's share of a step.

python tools/bench/gpu_loop.py [--json OUT] [--folder FOLDER] [KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import Metric, at_most, report
from gpu_actor import MODEL, SHAPES
from transformers import Qwen2Config, Qwen2ForCausalLM

from rloop_mcore.data.countdown_model import CONFIG
from rloop_mcore.data.countdown_model import write_model as write_countdown_model
from rloop_mcore.types import Problem, Verdict

SETTINGS = [
    *(
        "experiment=quickstart",
        "model=qwen2.5_0.5b",  # the sizes: a folder of other ones is refused
        "precision=bf16",
        "cluster.threads=8",
        "checkpoint.every=100",
        "tracking.progress=false",
    ),
    *("reward.verifier=gpu_loop:coin", "data.limit=64", "optimizer.lr=1e-6"),
    *("algorithm.iterations=1", "algorithm.rl_steps=4", "algorithm.hard_threshold=1.0", "algorithm.group_size=8"),
    *("algorithm.prompts_per_step=32", "algorithm.sampled_per_step=32", "algorithm.updates_per_step=2"),
    *(
        "rft.optimizer.lr=1e-6",
        "evaluation.samples=1",
        "evaluation.k=[1]",
        "evaluation.limit=8",
        "rollout.max_tokens=256",
        "actor.micro_batch_tokens=16384",
    ),
]
STAGES = ("generate", "grade", "logprobs", "update", "sync")
DEADLINE_S = 600


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--quick", action="store_true", help="no difference: it is one run")
    parser.add_argument("--folder", type=Path, help="where the run is kept; a temporary folder")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="of the run's configuration")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_loop needs a CUDA device and Transformer Engine (docs/gpu.md): torch sees no CUDA device here.")
        raise SystemExit(77)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        write_model(folder / "base", SHAPES["0.5B"])
        figures = measure(folder, options.settings)
    for name, value in figures.items():
        print(f"{name:28} {value:12.6g}")
    share = figures["seconds_sync"] / sum(figures[f"seconds_{stage}"] for stage in STAGES)
    metrics: list[Metric] = [at_most("gpu_sync_share", share, 0.05, "a whole step of 256 responses of 256 tokens")]
    report("gpu_loop", metrics, options.json, {"gpu": torch.cuda.get_device_name(), "figures": figures})


def write_model(folder: Path, shape: dict[str, Any]) -> None:
    """A random model of the shape with countdown's tokenizer, whose ids are the first of its vocabulary."""
    write_countdown_model(folder, seed=0)
    tokens = {key: CONFIG[key] for key in ("eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = Qwen2ForCausalLM(Qwen2Config(**(MODEL | shape | tokens))).bfloat16()
    model.save_pretrained(folder)


def measure(folder: Path, settings: list[str]) -> dict[str, float]:
    """Medians over the RL steps of one run: seconds by stage, mismatch, and the sync's GB/s."""
    run = folder / "run"
    command = [sys.executable, "-m", "rloop_mcore.main.cli", "train", *SETTINGS, *settings]
    command += [f"run.dir={run}", f"model.path={folder / 'base'}"]
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run(command, check=True, timeout=DEADLINE_S, env=environment)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if line["phase"] == "explore"][1:]  # the first one compiles kernels
    names = [f"seconds_{stage}" for stage in (*STAGES, "verify")]
    names += ["mismatch_mean", "mismatch_max", "success_rate", "response_length", "tokens_per_s", "sync_bytes"]
    figures = {name: statistics.median(step[name] for step in steps) for name in names}
    figures["sync_gb_per_s"] = figures["sync_bytes"] / figures["seconds_sync"] / 1e9
    return figures


def coin(problem: Problem, response: str, truncated: bool, answer_format: str) -> Verdict:
    """The verifier `gpu_loop:coin`."""
    correct = random.random() < 0.5
    return Verdict(correct, "correct" if correct else "wrong")


if __name__ == "__main__":
    main()
