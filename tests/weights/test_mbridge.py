"""Names and layouts against mbridge, an independent description of the same families (`make test-mbridge` installs it).

mbridge names parameters as Transformer Engine's modules do.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_model import open_groups
from safetensors.torch import load_file
from tiny_models import make_folder
from transformers import AutoConfig

from rloop_mcore.actor import parallel
from rloop_mcore.config import LayoutConfig
from rloop_mcore.weights.families import choose_family
from rloop_mcore.weights.family import HfConfig, Parameter, Split, place

mbridge = pytest.importorskip("mbridge")

CASES = {
    "qwen2": {"kv_heads": 4, "ratio": 7, "tied": False},
    "llama": {"kv_heads": 4, "ratio": 1, "tied": False},
    "qwen3": {"kv_heads": 4, "ratio": 2, "tied": False},
    "qwen3_moe": {"kv_heads": 4, "ratio": 2, "tied": False},
}


def their_name(parameter: Parameter, experts: int) -> str:
    """The parameter's name in Transformer Engine's modules, experts in one grouped layer."""
    where = place(parameter, layers=4, experts=experts)
    if len(where.index) == 2:
        layer, expert = where.index
        return f"decoder.layers.{layer}.mlp.experts.{where.keys[0].rpartition('experts.')[2]}{expert}"
    layer_of = f"decoder.layers.{where.index[0]}." if where.index else ""
    return re.sub(r"^decoder\.layers\.", layer_of, where.keys[0])


@pytest.mark.parametrize("family", CASES)
def test_names_and_shards_are_mbridges(family: str, tmp_path: Path) -> None:
    make_folder(tmp_path, family, **CASES[family])
    tensors = load_file(tmp_path / "model.safetensors")
    open_groups(LayoutConfig())
    try:
        theirs: Any = mbridge.AutoBridge.from_config(AutoConfig.from_pretrained(tmp_path), dtype=torch.float32)
    finally:
        parallel.destroy()
    config = HfConfig.read(tmp_path)
    parameters = choose_family(config).exported(config)
    experts = 4 if family == "qwen3_moe" else 0
    assert len(parameters) > 20
    for parameter in parameters:
        name = their_name(parameter, experts)
        assert theirs._weight_name_mapping_mcore_to_hf(name) == [source.name for source in parameter.sources], name
        sources = [tensors[source.name] for source in parameter.sources]
        whole = theirs._weight_to_mcore_format(name, sources)
        assert torch.equal(parameter.shard(tensors.__getitem__, 0, 1), whole), name
        if parameter.split is Split.VOCABULARY:
            continue  # the padded rows are cut by Megatron itself there
        for tp in (2, 4):
            like = torch.empty(parameter.shape(tp), device="meta")
            for rank, part in enumerate(theirs._weight_split_across_tp(name, whole, like, tp)):
                shard = (0, 1) if parameter.split is Split.REPLICATED else (rank, tp)
                ours = parameter.shard(tensors.__getitem__, *shard)
                assert torch.equal(ours, part), f"{name}, rank {rank} of {tp}"
