"""Run in several ranks for test_bridge_parallel: load, compare logits, export and save every case at every layout."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny_models import VOCABULARY, some_ids

from rloop_mcore.config import LayoutConfig
from rloop_mcore.platform.process import die_with_parent

LAYOUTS = {
    2: {
        "tp2": LayoutConfig(tp=2, etp=2),
        "pp2": LayoutConfig(pp=2),
        "pp2-vpp2": LayoutConfig(pp=2, vpp=2),
        "dp2": LayoutConfig(dp=2),
        "cp2": LayoutConfig(cp=2),
        "ep2": LayoutConfig(ep=2, dp=2),
        "tp2-ep2": LayoutConfig(tp=2, ep=2),
    },
    4: {
        "tp2-ep2-dp2": LayoutConfig(tp=2, ep=2, dp=2),
        "tp2-ep2-etp2-dp2": LayoutConfig(tp=2, ep=2, etp=2, dp=2),
        "tp2-pp2-vpp2": LayoutConfig(tp=2, pp=2, vpp=2),
        "tp2-pp2-ep2": LayoutConfig(tp=2, pp=2, ep=2),
        "pp2-ep2-dp2": LayoutConfig(pp=2, ep=2, dp=2),
        "tp4": LayoutConfig(tp=4, etp=4),
        "tp4-ep2": LayoutConfig(tp=4, ep=2),
    },
    8: {
        "tp4-pp2": LayoutConfig(tp=4, etp=4, pp=2),
        "tp4-pp2-ep2": LayoutConfig(tp=4, pp=2, ep=2),
    },
}


def fits(case: str, heads: int, layout: LayoutConfig) -> bool:
    """Whether Megatron can cut the case's model so."""
    return heads % layout.tp == 0 and (layout.ep == 1 or "moe" in case)


def main(folder: Path) -> None:
    import megatron_model

    from tests.layouts import leave_layout

    world = int(os.environ["WORLD_SIZE"])
    cases = sorted(path.parent for path in folder.glob("*/expected_logits"))
    differences = {}
    for name, layout in LAYOUTS[world].items():
        megatron_model.open_groups(layout)
        for case in cases:
            heads = json.loads((case / "config.json").read_text())["num_attention_heads"]
            if fits(case.name, heads, layout):
                differences[f"{case.name}-{name}"] = run(case, layout, folder / f"{case.name}-{name}")
        leave_layout()
    if dist.get_rank() == 0:
        (folder / f"differences-{world}.json").write_text(json.dumps(differences))
    dist.barrier()
    dist.destroy_process_group()


@torch.no_grad()
def run(case: Path, layout: LayoutConfig, out: Path) -> float | None:
    """Save the case's model as `out`; returns the largest difference of the logits (none over split sequences)."""
    import mcore_checkpoint
    from megatron_model import build_chunks, logits_of

    from rloop_mcore.weights import gather
    from rloop_mcore.weights.bridge import HfBridge, _named_parameters

    bridge = HfBridge(case)
    dtype = getattr(torch, json.loads((case / "config.json").read_text())["dtype"])
    chunks = build_chunks(bridge.architecture(), layout, dtype)
    bridge.load(chunks, case)
    difference = None
    if layout.cp == 1:
        expected = load_file(case / "expected_logits")["logits"]
        logits = logits_of(chunks, layout, some_ids())[..., :VOCABULARY].float()
        difference = (logits - expected).abs().max().item()
    tensors = bridge.export(chunks)
    if dist.get_rank() == 0:
        bridge.save(tensors, out)
    else:
        assert list(tensors) == []
    twice = {name: 2 * parameter for name, parameter in _named_parameters(chunks).items()}
    doubled = {name: tensor.gather().clone() for name, tensor in gather.scattered(bridge._exported, twice)}
    if dist.get_rank() == 0:
        tensors = load_file(case / "model.safetensors")
        assert all(torch.equal(tensor, 2 * tensors[name]) for name, tensor in doubled.items())
    with patch.object(gather, "_CHUNK_BYTES", 400):  # a few rows at a time
        for number, (name, tensor) in enumerate(bridge.export(chunks)):
            if number % 2:  # the others are not wanted
                of_place = (dtype, torch.float64)[number // 2 % 2]
                place = torch.empty((*tensor.shape, 2), dtype=of_place)[..., 0]  # not dense
                tensor.gather_into(place)
                assert torch.equal(place, tensors[name].to(of_place)), name
    for converted in sorted(case.glob("mcore-*")):
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.zero_()
        mcore_checkpoint.load(chunks, converted)
        loaded = {name: tensor.gather().clone() for name, tensor in bridge.export(chunks)}
        if dist.get_rank() == 0:
            assert all(torch.equal(tensor, tensors[name]) for name, tensor in loaded.items()), converted
    mcore_checkpoint.save(chunks, out.with_name(f"{out.name}-mcore"))
    return difference


if __name__ == "__main__":
    die_with_parent(os.getppid())
    main(Path(sys.argv[1]))
