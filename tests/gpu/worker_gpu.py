"""Run jobs of the GPU tests: `worker_gpu.py DEVICE JOBS OUT`.

JOBS is a JSON list of {"name", "task", "folder", "config": sections of the configuration, ...}; OUT gets {name: what
the task returned, or {"error": traceback}}.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

DEVICE = sys.argv[1]
if DEVICE == "cpu":
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # Megatron would take its CUDA kernels
elif "RANK" in os.environ:  # two ranks on one GPU
    os.environ |= {"NCCL_HOSTID": os.environ["RANK"], "LOCAL_RANK": "0"}

from rloop_mcore import platform  # noqa: E402

platform.setup(DEVICE, 4)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from gpu_jobs import SGLANG_VARIABLE, read_batch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from parity_model import CLIP_HIGH, CLIP_LOW, DUAL_CLIP, TEMPERATURE  # noqa: E402

from rloop_mcore.actor import parallel  # noqa: E402
from rloop_mcore.actor.actor import MegatronActor  # noqa: E402
from rloop_mcore.actor.logprobs import token_logprobs  # noqa: E402
from rloop_mcore.config import (  # noqa: E402
    ActorConfig,
    AlgorithmConfig,
    ClusterConfig,
    Config,
    Fp8Config,
    LayoutConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
)
from rloop_mcore.hf_config import read_hf_config  # noqa: E402
from rloop_mcore.rollout.fleet import Fleet  # noqa: E402
from rloop_mcore.rollout.launch import EmbeddedServer, SGLangServer  # noqa: E402
from rloop_mcore.rollout.served import ServedModel  # noqa: E402
from rloop_mcore.types import Example, SampleRequest, Sampling, Trajectory  # noqa: E402
from rloop_mcore.weights.bridge import HfBridge, _named_parameters  # noqa: E402
from rloop_mcore.weights.channel import BroadcastChannel  # noqa: E402
from rloop_mcore.weights.gather import scattered  # noqa: E402
from tests.layouts import leave_layout  # noqa: E402

LEARNING = OptimizerConfig(lr=3e-4, weight_decay=0.0)
FROZEN = OptimizerConfig(lr=0.0, weight_decay=0.0, clip_grad=0.0)
# Adam's update with a great epsilon is the (clipped) gradient: that shows the clipping, which Adam's own scale hides.
PLAIN_GRADIENT = OptimizerConfig(lr=1e3, eps=1.0, clip_grad=0.01, weight_decay=0.0)
PROBE_LOGITS = 151_936
ENGINE_S = 240.0
# The kernels that docs/gpu.md's kit of SGLang has; a whole installation has them too.
SGLANG_FLAGS = ("--attention-backend", "triton", "--sampling-backend", "pytorch", "--grammar-backend", "none")
SGLANG_FLAGS += ("--disable-cuda-graph", "--mem-fraction-static", "0.3", "--skip-tokenizer-init")


def everywhere(method: str, actor: MegatronActor, *arguments: object) -> Any:
    """Call a collective method on every rank at once."""
    return getattr(MegatronActor, method).__wrapped__(actor, *arguments)


def saved(actor: MegatronActor, path: Path) -> None:
    everywhere("start_save", actor, path)
    everywhere("finish_save", actor)


def exported(actor: MegatronActor, of: Any = lambda parameter: parameter) -> dict[str, torch.Tensor]:
    tensors = {name: of(parameter) for name, parameter in _named_parameters(actor._chunks).items()}
    return {name: t.gather().float().cpu().clone() for name, t in scattered(actor._bridge._exported, tensors)}


def fp8_layers(actor: MegatronActor) -> list[bool]:
    """Whether each layer's last forward pass went through Transformer Engine's FP8."""
    layers = actor._chunks[0].decoder.layers
    return [bool(getattr(layer.mlp.linear_fc1, "fp8", False)) for layer in layers]


def update(job: dict[str, Any], actor: MegatronActor, folder: Path) -> dict[str, Any]:
    """Logprobs and every gradient of one policy update."""
    batch = read_batch(folder)
    everywhere("begin", actor, folder, FROZEN, 1)
    logprobs = everywhere("logprobs", actor, [row.trajectory for row in batch], False)
    if actor._config.precision == "fp8_delayed":  # scales come from the update before
        everywhere("update", actor, batch)
        logprobs = everywhere("logprobs", actor, [row.trajectory for row in batch], False)
    metrics = everywhere("update", actor, batch)
    gradients = exported(actor, lambda parameter: parameter.main_grad)
    layers = fp8_layers(actor) if job["model"] == "dense" else []
    return {"logprobs": logprobs, "metrics": metrics, "gradients": gradients, "fp8_layers": layers}


def train(job: dict[str, Any], actor: MegatronActor, folder: Path) -> dict[str, Any]:
    """`updates` SFT updates on one batch, a checkpoint in the middle, and the second half again from it."""
    examples = [Example(row.trajectory.prompt_ids, row.trajectory.response_ids) for row in read_batch(folder)]
    updates, checkpoint = job["updates"], Path(job["folder"]) / f"{job['name']}.checkpoint"

    def losses(count: int) -> list[float]:
        return [everywhere("fine_tune", actor, examples, "token_mean")["loss"] for _ in range(count)]

    everywhere("begin", actor, folder, LEARNING, updates)
    start = exported(actor)
    first = losses(1)
    one = exported(actor)
    first += losses(updates // 2 - 1)
    saved(actor, checkpoint)
    rest = losses(updates - updates // 2)
    everywhere("begin", actor, folder, LEARNING, updates)
    everywhere("load", actor, checkpoint)
    resumed = losses(updates - updates // 2)
    return {"losses": first + rest, "resumed": resumed, "start": start, "one": one}


def clip(job: dict[str, Any], actor: MegatronActor, folder: Path) -> dict[str, Any]:
    """The weights before and after one step along a clipped gradient, and the gradient's norm."""
    everywhere("begin", actor, folder, PLAIN_GRADIENT, 1)
    start = exported(actor)
    metrics = everywhere("update", actor, read_batch(folder))
    return {"start": start, "end": exported(actor), "grad_norm": metrics["grad_norm"]}


def not_finite(job: dict[str, Any], actor: MegatronActor, folder: Path) -> dict[str, Any]:
    """An update whose loss is NaN between two sound ones."""
    batch = read_batch(folder)
    everywhere("begin", actor, folder, LEARNING, 3)
    everywhere("update", actor, batch)
    before = exported(actor)
    broken = [replace(row, advantage=float("nan")) for row in batch]
    skipped = everywhere("update", actor, broken)["skipped"]
    after = exported(actor)
    return {"before": before, "after": after, "skipped": skipped, "next": everywhere("update", actor, batch)}


def checkpointed(job: dict[str, Any], actor: MegatronActor, folder: Path) -> dict[str, Any]:
    """Three updates and a checkpoint, or the checkpoint `load`; then one more update."""
    batch = read_batch(folder)
    everywhere("begin", actor, folder, OptimizerConfig(lr=1e-3), 4)
    if "load" in job:
        everywhere("load", actor, Path(job["load"]))
    else:
        for part in (batch[:4], batch[4:8], batch[8:]):
            everywhere("update", actor, part)
        saved(actor, Path(job["save"]))
    weights = exported(actor)
    everywhere("update", actor, batch)
    return {"weights": weights, "next": exported(actor)}


def logprob_memory(job: dict[str, Any], actor: MegatronActor, folder: Path) -> dict[str, Any]:
    """Peak bytes and values of logprobs and entropy, forward and backward, ours and with whole fp32 logits."""
    tokens, width = job["tokens"], 1024
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(PROBE_LOGITS, width, device="cuda", dtype=torch.bfloat16) / 16
    targets = torch.randint(PROBE_LOGITS, (tokens,), device="cuda")
    group = parallel_state.get_tensor_model_parallel_group()

    def chunked(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return token_logprobs(x, w, targets, PROBE_LOGITS, 1.0, group)

    def naive(x: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_p = (x @ w.T).float().log_softmax(-1)
        return log_p.gather(-1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    result: dict[str, Any] = {"peak": {}}
    for name, way in (("chunked", chunked), ("naive", naive)):
        x, w = (tensor.clone().requires_grad_() for tensor in (hidden, weight))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        logprobs, entropy = way(x, w)
        (logprobs.sum() + 0.1 * entropy.sum()).backward()
        values = {"logprobs": logprobs.detach(), "entropy": entropy.detach(), "of_hidden": x.grad, "of_weight": w.grad}
        result["peak"][name] = torch.cuda.max_memory_allocated() - held
        result[name] = {key: value.float().cpu() for key, value in values.items()}
    return result


def synced(job: dict[str, Any], actor: MegatronActor, folder: Path) -> dict[str, Any]:
    """An engine on the same GPU that is synced, sleeps, and is synced again after an update that changed the weights.

    Of each sync: its metrics, and what the engine and the actor think of the tokens that the engine drew. "stale": what
    the actor thinks of the last ones after one more update.
    """
    batch = read_batch(folder)
    everywhere("begin", actor, folder, OptimizerConfig(lr=1e-2, weight_decay=0.0), 3)
    server = server_of(job, folder)
    channel = BroadcastChannel("nccl", "weights", ENGINE_S) if job["way"] == "nccl" else None
    requests = [SampleRequest(row.trajectory.prompt_ids, seed=i) for i, row in enumerate(batch) for _ in range(4)]
    sampling = Sampling(max_tokens=32, temperature=TEMPERATURE)
    result: dict[str, Any] = {"syncs": [], "engine": [], "actor": [], "free": []}
    model = ServedModel.of(read_hf_config(folder), folder)
    times: dict[str, Any] = {"start_timeout_s": ENGINE_S, "request_timeout_s": ENGINE_S}
    with Fleet([server], channel, model=model, bucket_mib=1, backend="nccl", **times) as fleet:
        for version in (1, 2):
            result["syncs"].append(fleet.sync(actor.export, version))
            found = fleet.generate(requests, sampling)
            pairs = list(zip(requests, found, strict=True))
            drawn = [
                Trajectory(
                    0, 0, "", i, r.prompt_ids, c.response_ids, c.logprobs, "stop", c.weight_versions, False, 0.0, ""
                )
                for i, (r, c) in enumerate(pairs)
            ]
            result["engine"].append([c.logprobs for c in found])
            result["actor"].append(everywhere("logprobs", actor, drawn, False))
            result["free"].append(free_bytes())
            if version == 1 and job["sleep"]:
                fleet.sleep()
                result["free"].append(free_bytes())
            everywhere("update", actor, batch)
            result["stale"] = everywhere("logprobs", actor, drawn, False)
    return result


def server_of(job: dict[str, Any], folder: Path) -> EmbeddedServer | SGLangServer:
    """The engine, started; for NCCL it is on another host than the trainer."""
    trainer = dict(os.environ)
    if job["way"] == "nccl":
        os.environ["NCCL_HOSTID"] = "engine"
    common: dict[str, Any] = {"max_running": 64, "threads": 4, "dtype": "bfloat16", "device": DEVICE}
    log = folder / job["name"].replace(" ", "-")
    try:
        if job["engine"] == "embedded":
            return EmbeddedServer(folder, log, "engine", **common)
        flags = [*SGLANG_FLAGS, *(["--enable-memory-saver"] if job["sleep"] else [])]
        python = Path(os.environ[SGLANG_VARIABLE])
        return SGLangServer(folder, log, "engine", python=python, arguments=flags, **common)
    finally:
        os.environ.clear()
        os.environ.update(trainer)


def free_bytes() -> int:
    """Of the GPU, for anyone; what torch keeps for later counts as free."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] if DEVICE == "cuda" else 0


TASKS = {task.__name__: task for task in (update, train, clip, not_finite, checkpointed, logprob_memory, synced)}


def configuration(job: dict[str, Any]) -> Config:
    sections = job.get("config", {})
    return Config(
        run=RunConfig(**sections.get("run", {})),
        precision=sections.get("precision", "bf16"),
        fp8=Fp8Config(**sections.get("fp8", {})),
        layout=LayoutConfig(**sections.get("layout", {})),
        actor=ActorConfig(**({"micro_batch_tokens": 512} | sections.get("actor", {}))),
        algorithm=AlgorithmConfig(clip_low=CLIP_LOW, clip_high=CLIP_HIGH, dual_clip=DUAL_CLIP),
        rollout=RolloutConfig(temperature=TEMPERATURE),
        cluster=ClusterConfig(collective_timeout_s=120.0),
    )


def main() -> None:
    jobs, out = json.loads(sys.argv[2]), Path(sys.argv[3])
    results: dict[str, Any] = {}
    for job in jobs:
        folder = Path(job["folder"])
        try:
            actor = MegatronActor(configuration(job), HfBridge(folder))
            results[job["name"]] = TASKS[job["task"]](job, actor, folder)
        except Exception:
            results[job["name"]] = {"error": traceback.format_exc()}
            if "RANK" in os.environ:  # the other ranks may be stuck: no job after this one can be trusted
                break
        if parallel_state.is_initialized():
            leave_layout()
        if DEVICE == "cuda":
            from transformer_engine.pytorch.quantization import FP8GlobalStateManager

            FP8GlobalStateManager.reset()  # else it goes on updating the scales of the last job's modules
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(results, out)
    parallel.destroy()


if __name__ == "__main__":
    main()
