"""Run by torchrun for test_bridge_parallel: load, compare logits, export and save every case at every layout."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny_models import VOCABULARY, some_ids

from rloop_mcore import platform
from rloop_mcore.config import LayoutConfig
from rloop_mcore.platform.process import die_with_parent

LAYOUTS = {"tp2": LayoutConfig(tp=2), "pp2": LayoutConfig(pp=2), "dp2": LayoutConfig(dp=2)}


def main(folder: Path, layouts: list[str]) -> None:
    platform.setup("cpu", threads=1)
    from megatron.core import parallel_state

    from rloop_mcore.actor import parallel

    cases = sorted(path.parent for path in folder.glob("*/expected_logits"))
    differences = {}
    for name in layouts:
        parallel.initialize(LAYOUTS[name], seed=0, timeout_s=60)
        for case in cases:
            differences[f"{case.name}-{name}"] = run(case, LAYOUTS[name], folder / f"{case.name}-{name}")
        parallel_state.destroy_model_parallel()
    if dist.get_rank() == 0:
        (folder / "differences.json").write_text(json.dumps(differences))
    dist.barrier()
    dist.destroy_process_group()


@torch.no_grad()
def run(case: Path, layout: LayoutConfig, out: Path) -> float:
    """Save the case's model as `out`; returns the largest difference of the logits (on rank 0)."""
    from rloop_mcore.actor.model import build_model
    from rloop_mcore.weights.bridge import HfBridge

    bridge = HfBridge(case)
    dtype = getattr(torch, json.loads((case / "config.json").read_text())["dtype"])
    chunks = build_model(bridge.architecture(), layout, dtype)
    bridge.load(chunks, case)
    expected = load_file(case / "expected_logits")["logits"]
    difference = (logits_on_rank_0(chunks[0], layout)[..., :VOCABULARY] - expected).abs().max().item()
    tensors = bridge.export(chunks)
    if dist.get_rank() == 0:
        bridge.save(tensors, out)
    else:
        assert list(tensors) == []
    return difference


def logits_on_rank_0(model: torch.nn.Module, layout: LayoutConfig) -> torch.Tensor:
    ids = some_ids()
    positions = torch.arange(ids.size(1)).expand_as(ids)
    if layout.pp == 2 and dist.get_rank() == 0:
        dist.send(model(ids, positions, None), dst=1)
    if layout.pp == 2 and dist.get_rank() == 1:
        hidden = torch.empty(ids.size(1), ids.size(0), model.config.hidden_size, dtype=model.config.params_dtype)
        dist.recv(hidden, src=0)
        model.set_input_tensor(hidden)
    logits = model(ids, positions, None).float() if layout.pp == 1 or dist.get_rank() == 1 else None
    if layout.tp == 2:
        shards = [torch.empty_like(logits) for _ in range(2)]
        dist.all_gather(shards, logits)
        return torch.cat(shards, dim=-1)
    if layout.pp == 2:
        logits = torch.empty(*ids.shape, VOCABULARY) if logits is None else logits
        dist.broadcast(logits, src=1)
    return logits


if __name__ == "__main__":
    die_with_parent(os.getppid())
    main(Path(sys.argv[1]), sys.argv[2:])
