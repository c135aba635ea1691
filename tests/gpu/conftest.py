"""Everything in this folder needs a GPU and Transformer Engine (docs/gpu.md); elsewhere it is skipped."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def missing() -> str | None:
    """What this machine lacks."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device here"
    if importlib.util.find_spec("transformer_engine") is None:
        return "there is a CUDA device, but no Transformer Engine (docs/gpu.md says how to install it)"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lacking = missing()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if lacking:
                item.add_marker(pytest.mark.skip(reason=lacking))
