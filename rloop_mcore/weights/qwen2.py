"""Qwen2 and Qwen2.5: a dense decoder whose Q, K and V projections have biases."""

from __future__ import annotations

from functools import partial
from typing import Any

from rloop_mcore.weights import decoder
from rloop_mcore.weights.family import Family, HfConfig


def _architecture(config: HfConfig) -> dict[str, Any]:
    config.honour(decoder.HONOURED)
    settings = decoder.architecture(config)
    settings["transformer"]["add_qkv_bias"] = True
    return settings


FAMILY = Family("qwen2", "Qwen2ForCausalLM", _architecture, partial(decoder.parameters, qkv_bias=True))
