"""Qwen2 and Qwen2.5: a dense decoder whose Q, K and V projections have biases."""

from __future__ import annotations

from typing import Any

from rloop_mcore.weights import dense
from rloop_mcore.weights.family import Family, HfConfig, Parameter


def _architecture(config: HfConfig) -> dict[str, Any]:
    config.honour(dense.HONOURED)
    settings = dense.architecture(config)
    settings["transformer"]["add_qkv_bias"] = True
    return settings


def _parameters(config: HfConfig) -> list[Parameter]:
    return dense.parameters(config, qkv_bias=True)


FAMILY = Family("qwen2", "Qwen2ForCausalLM", _architecture, _parameters)
