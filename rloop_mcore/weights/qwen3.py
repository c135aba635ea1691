"""Qwen3: a dense decoder that norms every query and key head, without biases."""

from __future__ import annotations

from functools import partial
from typing import Any

from rloop_mcore.weights import decoder
from rloop_mcore.weights.family import Family, HfConfig


def _architecture(config: HfConfig) -> dict[str, Any]:
    config.honour(decoder.HONOURED | {"attention_bias": False})
    settings = decoder.architecture(config)
    settings["transformer"]["qk_layernorm"] = True
    return settings


FAMILY = Family("qwen3", "Qwen3ForCausalLM", _architecture, partial(decoder.parameters, qk_norm=True))
