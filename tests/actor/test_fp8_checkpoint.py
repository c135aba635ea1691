"""A checkpoint of parameters that Transformer Engine keeps in FP8; stand-ins for its tensors and its modules."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rloop_mcore import platform

platform.setup("cpu", threads=1)

from megatron.core import dist_checkpointing, fp8_utils  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor  # noqa: E402

from rloop_mcore.actor import checkpoint  # noqa: E402


class InFp8(torch.Tensor):
    """Counts as Transformer Engine's."""


def test_parameters_in_fp8_are_read_in_bf16_and_their_scales_are_the_saved_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron reads gate and up of an FP8 matrix apart, with a scale for each; it has one."""
    monkeypatch.setattr(fp8_utils, "HAVE_TE_FP8_TENSOR_CLASS", True)
    monkeypatch.setattr(fp8_utils, "FP8_TENSOR_CLASS", InFp8)
    monkeypatch.setattr(fp8_utils, "dequantize_fp8_tensor", lambda tensor: tensor.as_subclass(torch.Tensor))
    happened: list[Any] = []
    linear = torch.nn.Module()
    linear.fp8_meta = {}
    model: Any = torch.nn.ModuleDict({"linear": linear})
    weight = ShardedTensor.from_rank_offsets("linear.weight", torch.ones(4, 4).as_subclass(InFp8))

    def load(wanted: dict[str, Any], path: str) -> dict[str, Any]:
        happened.append(type(wanted["model0"]["linear.weight"].data))
        return {
            "model0": {"linear._extra_state": torch.ones(10)},
            "update": 0,
            "steps": 0,
            "rng": torch.get_rng_state(),
        }

    def set_scales(module: torch.nn.Module, values: list[torch.Tensor]) -> None:
        assert module is linear
        happened.append([value.tolist() for value in values])

    monkeypatch.setattr(checkpoint, "_check", lambda path: None)
    monkeypatch.setattr(checkpoint, "load_sharded_metadata", lambda path: {})
    monkeypatch.setattr(checkpoint, "state_of", lambda *_: {"model0": {"linear.weight": weight}})
    monkeypatch.setattr(checkpoint, "set_scales", set_scales)
    monkeypatch.setattr(dist_checkpointing, "load", load)
    chunk: Any = SimpleNamespace(module=model, load_state_dict=lambda state: happened.append(sorted(state)))
    optimizer: Any = SimpleNamespace(megatron=SimpleNamespace(chained_optimizers=[]))
    checkpoint.load(tmp_path, [chunk], optimizer)
    assert happened == [torch.Tensor, [[1.0] * 10], [], [[1.0] * 10]]  # values note their greatest one as they come
