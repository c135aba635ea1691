"""The models, the batch and the processes of the GPU tests.

Nothing runs CUDA in pytest's process: a kernel that crashes takes its process along. A job is one actor in a worker
process; jobs of one call share the process. What the GPU computes is held against transformers in fp32 on the CPU.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent / "parallel"))

from parity_model import TEMPERATURE, hub_named, reference_update  # noqa: E402

from rloop_mcore.types import Experience, Trajectory  # noqa: E402

DEVICE = "cuda"
DEADLINE_S = 280
SGLANG_VARIABLE = "RLOOP_GPU_SGLANG"  # the interpreter that has SGLang, for the tests that need one
VOCABULARY = 512
# All sizes are multiples of 128, the largest block of an FP8 recipe.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "max_position_embeddings": 512,
    "eos_token_id": 0,
    "bos_token_id": None,
    "initializer_range": 0.03,
}
MODELS: dict[str, Any] = {
    "dense": Qwen2Config(tie_word_embeddings=True, **_SIZES),
    "moe": Qwen3MoeConfig(
        moe_intermediate_size=256,
        num_experts=4,
        num_experts_per_tok=2,
        head_dim=64,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        **_SIZES,
    ),
}

# NCCL refuses two ranks on one GPU of one host; so they say that theirs is another one, and talk over sockets.
TWO_HOSTS = {"NCCL_HOSTID": "trainer", "NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}
TWO_HOSTS |= {"NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo"}

Tensors = dict[str, torch.Tensor]


class Results(dict[str, dict[str, Any]]):
    """By the jobs' names; to ask for that of a job that failed, or came after one, fails the test."""

    def __getitem__(self, name: str) -> dict[str, Any]:
        result = self.get(name, {"error": f"did not run: {list(self)[-1]} failed before it"})
        if "error" in result:
            pytest.fail(f"{name}: {result['error']}")
        return result


def write_model(name: str, folder: Path) -> Path:
    """The model of `MODELS` with random weights that bf16 holds exactly, and `batch.json`, as an HF folder."""
    torch.manual_seed(3)
    model = (Qwen2ForCausalLM if name == "dense" else Qwen3MoeForCausalLM)(MODELS[name]).bfloat16().float()
    model.save_pretrained(folder)
    (folder / "batch.json").write_text(json.dumps(_rows(model)), encoding="utf-8")
    return folder


def read_batch(folder: Path) -> list[Experience]:
    """What `write_model` wrote: rows of very different lengths, a little off the policy."""
    batch = []
    for i, row in enumerate(json.loads((folder / "batch.json").read_text(encoding="utf-8"))):
        old, response = tuple(row["old"]), tuple(row["response"])
        sample = (0, 0, str(i), 0, tuple(row["prompt"]), response, old, "stop", ((0, 1),), i % 2 == 0, float(i % 2), "")
        batch.append(Experience(Trajectory(*sample), (-1.0) ** i * (0.5 + i / 12), old))
    return batch


def reference(folder: Path, name: str) -> dict[str, Any]:
    """{"logprobs": rows, "gradients": by HF name} of one policy update in transformers, fp32, row by row."""
    model = (Qwen2ForCausalLM if name == "dense" else Qwen3MoeForCausalLM).from_pretrained(folder, dtype=torch.float32)
    logprobs, _ = reference_update(model, read_batch(folder))
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return {"logprobs": logprobs, "gradients": hub_named(gradients)}


def run(
    jobs: list[dict[str, Any]], folder: Path, device: str = DEVICE, processes: int = 1, two_hosts: bool = False
) -> Results:
    """What each job of `worker_gpu.py` came to. two_hosts: NCCL between processes that share the GPU, for one process
    too."""
    out = folder / f"{jobs[0]['name']}.{device}{processes}.pt"
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "rloop_mcore.platform.torchrun", "--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "4", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if processes > 1 or two_hosts:
        environment |= TWO_HOSTS
    done = subprocess.run(
        [*command, str(HERE / "worker_gpu.py"), device, json.dumps(jobs), str(out)],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        env=environment,
    )
    if done.returncode != 0:
        pytest.fail(f"exit code {done.returncode}: {done.stdout[-2000:]}\n{done.stderr[-8000:]}")
    return Results(torch.load(out, weights_only=True))


def rms(rows: Iterable[Iterable[float]], wanted: Iterable[Iterable[float]]) -> float:
    """Root mean square of the differences of all numbers."""
    pairs = [(a, b) for row, other in zip(rows, wanted, strict=True) for a, b in zip(row, other, strict=True)]
    return (sum((a - b) ** 2 for a, b in pairs) / len(pairs)) ** 0.5


def relative(tensors: Tensors, wanted: Tensors) -> float:
    """|tensors - wanted| / |wanted|, Frobenius norms over all of them."""
    assert tensors.keys() == wanted.keys()
    difference = sum(float((tensors[name].double() - t.double()).square().sum()) for name, t in wanted.items())
    return (difference / sum(float(t.double().square().sum()) for t in wanted.values())) ** 0.5


def _rows(model: PreTrainedModel) -> list[dict[str, Any]]:
    draw = random.Random(5)
    rows = []
    for _ in range(12):
        prompt = [draw.randrange(VOCABULARY) for _ in range(draw.randint(8, 40))]
        response = [draw.randrange(VOCABULARY) for _ in range(draw.randint(10, 160))]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        chosen = (logits / TEMPERATURE).log_softmax(-1)[range(len(response)), response]
        old = [float(value) + draw.uniform(-0.15, 0.15) for value in chosen]
        rows.append({"prompt": prompt, "response": response, "old": old})
    return rows
